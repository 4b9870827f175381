//! Classic BPF, written from its end: every jump goes forward, so whatever an
//! instruction jumps to is there before it.

use std::collections::HashMap;

use super::SeccompError;

/// Longest program the kernel takes (BPF_MAXINSNS).
const MAX_LEN: usize = 4096;

// linux/bpf_common.h
pub(super) const LD_W_ABS: u16 = 0x20;
pub(super) const ALU_AND_K: u16 = 0x54;
pub(super) const JA: u16 = 0x05;
pub(super) const JEQ_K: u16 = 0x15;
pub(super) const JGT_K: u16 = 0x25;
pub(super) const JGE_K: u16 = 0x35;
pub(super) const RET_K: u16 = 0x06;

/// `struct sock_filter` (linux/filter.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    pub(super) code: u16,
    pub(super) jt: u8,
    pub(super) jf: u8,
    pub(super) k: u32,
}

/// A place in the program: how many instructions there are from it to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Label(usize);

/// A program that grows at its front.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    reversed: Vec<Instruction>,
    /// The nearest instruction that returns a value.
    returns: HashMap<u32, Label>,
}

impl Assembler {
    /// A statement, followed by what is at the program's front.
    pub(super) fn statement(&mut self, code: u16, k: u32) -> Label {
        self.push(Instruction { code, jt: 0, jf: 0, k })
    }

    /// Returns `value`.
    pub(super) fn ret(&mut self, value: u32) -> Label {
        if let Some(&label) = self.returns.get(&value)
            && self.distance(label) <= usize::from(u8::MAX)
        {
            return label;
        }
        let label = self.statement(RET_K, value);
        self.returns.insert(value, label);
        label
    }

    /// Compares the accumulator with `k`. A conditional jump reaches 255
    /// instructions, an unconditional one helps it further.
    pub(super) fn branch(&mut self, code: u16, k: u32, yes: Label, no: Label) -> Label {
        // One more for a help of the other's.
        let near = |assembler: &mut Self, label| {
            let reach = usize::from(u8::MAX) - 1;
            if assembler.distance(label) <= reach { label } else { assembler.jump(label) }
        };
        let no = near(self, no);
        let yes = near(self, yes);
        // Both are at most 255 away now.
        let (jt, jf) = (self.distance(yes) as u8, self.distance(no) as u8);
        self.push(Instruction { code, jt, jf, k })
    }

    /// Goes on at `label`, which needs no instruction where it comes next.
    pub(super) fn go_to(&mut self, label: Label) -> Label {
        if self.distance(label) == 0 { label } else { self.jump(label) }
    }

    fn jump(&mut self, label: Label) -> Label {
        let k = u32::try_from(self.distance(label)).unwrap_or(u32::MAX);
        self.statement(JA, k)
    }

    /// Instructions between the one to be written next and `label`.
    fn distance(&self, label: Label) -> usize {
        self.reversed.len() - label.0
    }

    fn push(&mut self, instruction: Instruction) -> Label {
        self.reversed.push(instruction);
        Label(self.reversed.len())
    }

    /// The program from its beginning.
    pub(super) fn finish(mut self) -> Result<Vec<Instruction>, SeccompError> {
        if self.reversed.len() > MAX_LEN {
            return Err(SeccompError::TooLong { len: self.reversed.len(), most: MAX_LEN });
        }
        self.reversed.reverse();
        Ok(self.reversed)
    }
}
