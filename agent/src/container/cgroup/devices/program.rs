//! From rules to a program of type `BPF_PROG_TYPE_CGROUP_DEVICE`.
//!
//! The kernel calls it with a pointer to `struct bpf_cgroup_dev_ctx` (three
//! 32-bit words: access in the upper half and kind in the lower one, major,
//! minor) and allows what it returns 1 for.

use super::rules::{ALL, Access, Devices, Rules};
use rvm_protocol::bpf::Instruction;

// Registers: the result, the context, and what is read from it.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

// Opcodes (linux/bpf.h, linux/bpf_common.h); arithmetic and jumps of 32 bits.
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const COPY: u8 = 0xbc;
const SET: u8 = 0xb4;
const JUMP_IF_EQUAL: u8 = 0x16;
const JUMP_IF_NOT_EQUAL: u8 = 0x56;
const EXIT: u8 = 0x95;

fn load(to: u8, offset: i16) -> Instruction {
    Instruction { code: LOAD_WORD, registers: to | CONTEXT << 4, offset, immediate: 0 }
}

fn copy(to: u8, from: u8) -> Instruction {
    Instruction { code: COPY, registers: to | from << 4, offset: 0, immediate: 0 }
}

fn with(code: u8, register: u8, value: u32) -> Instruction {
    Instruction { code, registers: register, offset: 0, immediate: value.cast_signed() }
}

fn answer(allow: bool) -> [Instruction; 2] {
    [with(SET, RESULT, allow.into()), with(EXIT, 0, 0)]
}

/// The program that decides as `rules` do.
pub fn compile(rules: &Rules) -> Vec<Instruction> {
    let mut program = vec![
        load(KIND, 0),
        copy(ACCESS, KIND),
        with(SHIFT_RIGHT, ACCESS, 16),
        with(AND, KIND, 0xffff),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for (devices, access) in &rules.exceptions {
        program.extend(exception(rules.default_allow, *devices, *access));
    }
    program.extend(answer(rules.default_allow));
    program
}

/// Answers for what the exception covers and goes on behind it for the rest.
fn exception(default_allow: bool, devices: Devices, access: Access) -> Vec<Instruction> {
    let mut block = vec![with(JUMP_IF_NOT_EQUAL, KIND, devices.kind as u32)];
    for (register, number) in [(MAJOR, devices.major), (MINOR, devices.minor)] {
        block.extend(number.map(|number| with(JUMP_IF_NOT_EQUAL, register, number)));
    }
    if access != ALL {
        block.push(copy(SCRATCH, ACCESS));
        if default_allow {
            // Forbidden is what wants any of it.
            block.push(with(AND, SCRATCH, access));
            block.push(with(JUMP_IF_EQUAL, SCRATCH, 0));
        } else {
            // Allowed is what wants nothing else.
            block.push(with(AND, SCRATCH, ALL & !access));
            block.push(with(JUMP_IF_NOT_EQUAL, SCRATCH, 0));
        }
    }
    block.extend(answer(!default_allow));
    let length = block.len();
    for (index, instruction) in block.iter_mut().enumerate() {
        if matches!(instruction.code, JUMP_IF_EQUAL | JUMP_IF_NOT_EQUAL) {
            // Jumps count from the next instruction; a block has nine at most.
            instruction.offset = (length - index - 1) as i16;
        }
    }
    block
}

#[cfg(test)]
mod tests {
    use super::{
        super::rules::{Kind, MKNOD, READ, WRITE, tests::rule},
        *,
    };

    /// What the kernel would do with the instructions used here.
    fn run(program: &[Instruction], kind: Kind, access: Access, major: u32, minor: u32) -> bool {
        let context = [(access << 16) | kind as u32, major, minor];
        let mut registers = [0u32; 8];
        let mut at = 0;
        loop {
            let instruction = program[at];
            let (to, from) = ((instruction.registers & 15) as usize, (instruction.registers >> 4) as usize);
            let value = instruction.immediate.cast_unsigned();
            let mut jump = false;
            match instruction.code {
                LOAD_WORD => registers[to] = context[instruction.offset as usize / 4],
                AND => registers[to] &= value,
                SHIFT_RIGHT => registers[to] >>= value,
                COPY => registers[to] = registers[from],
                SET => registers[to] = value,
                JUMP_IF_EQUAL => jump = registers[to] == value,
                JUMP_IF_NOT_EQUAL => jump = registers[to] != value,
                EXIT => return registers[0] == 1,
                other => panic!("opcode {other:#x}"),
            }
            at += 1 + if jump { instruction.offset as usize } else { 0 };
        }
    }

    #[test]
    fn decides_as_the_rules_say() {
        let rules =
            [rule(false, "a", -1, -1, "rwm"), rule(true, "c", 10, 229, "r"), rule(true, "b", 8, -1, "rw")];
        let program = compile(&Rules::parse("r", &rules).unwrap());
        for (kind, access, major, minor, allowed) in [
            (Kind::Char, READ | WRITE, 1, 3, true),
            (Kind::Char, READ, 1, 1, false),
            (Kind::Char, MKNOD, 1, 1, true),
            (Kind::Char, READ, 10, 229, true),
            (Kind::Char, READ | WRITE, 10, 229, false),
            (Kind::Block, READ | WRITE, 8, 17, true),
            (Kind::Block, READ, 9, 17, false),
            (Kind::Block, READ, 1, 3, false),
            (Kind::Char, READ, 136, 4_000_000_000, true),
            (Kind::Char, READ, u32::MAX, u32::MAX, false),
        ] {
            let decided = run(&program, kind, access, major, minor);
            assert_eq!(decided, allowed, "{kind:?} {access} {major}:{minor}");
        }
    }

    #[test]
    fn what_is_forbidden_of_everything_is_forbidden_in_part() {
        let rules = [rule(true, "a", -1, -1, "rwm"), rule(false, "c", 10, 229, "w")];
        let program = compile(&Rules::parse("r", &rules).unwrap());
        for (access, minor, allowed) in
            [(READ, 229, true), (WRITE, 229, false), (READ | WRITE, 229, false), (WRITE, 230, true)]
        {
            assert_eq!(run(&program, Kind::Char, access, 10, minor), allowed, "{access} {minor}");
        }
    }
}
