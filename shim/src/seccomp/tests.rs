//! Programs are run by a small interpreter and compared with the profile, read
//! rule by rule.

use std::collections::BTreeMap;

use oci_spec::runtime::LinuxSeccomp;
use serde_json::{Value, json};

use super::{
    compile::{AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, X32_BIT},
    table::SYSCALLS,
    *,
};

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const AUDIT_ARCH_AARCH64: u32 = 0xc000_00b7;

fn profile(json: &Value) -> LinuxSeccomp {
    serde_json::from_value(json.clone()).unwrap()
}

fn compiled(json: &Value) -> Vec<u8> {
    compile(&profile(json)).unwrap().program
}

/// What a filter returns and after how many instructions (linux/filter.h).
fn run(program: &[u8], arch: u32, number: u32, args: [u64; 6]) -> (u32, usize) {
    let mut data = [number.to_le_bytes(), arch.to_le_bytes(), [0; 4], [0; 4]].concat();
    data.extend(args.iter().flat_map(|arg| arg.to_le_bytes()));
    let (mut accumulator, mut at, mut steps) = (0u32, 0usize, 0);
    loop {
        let instruction = &program[at * 8..][..8];
        let code = u16::from_ne_bytes([instruction[0], instruction[1]]);
        let k = u32::from_ne_bytes(instruction[4..].try_into().unwrap());
        at += 1;
        steps += 1;
        let jump = |yes: bool| usize::from(if yes { instruction[2] } else { instruction[3] });
        match code {
            0x20 => accumulator = u32::from_le_bytes(data[k as usize..][..4].try_into().unwrap()),
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += jump(accumulator == k),
            0x25 => at += jump(accumulator > k),
            0x35 => at += jump(accumulator >= k),
            0x06 => return (k, steps),
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// A profile read rule by rule.
struct Reading {
    default: u32,
    strict: bool,
    listed: Vec<String>,
    /// By column of the table: what each number's rules say.
    rules: [BTreeMap<u32, Vec<Rule>>; 3],
    last: [Option<u32>; 3],
}

/// A value and the alternatives of conditions it depends on.
#[derive(Clone, Debug)]
struct Rule(u32, Vec<Vec<Condition>>);

/// Argument, operator, value and second value.
type Condition = (usize, String, u64, u64);

impl Reading {
    fn new(json: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let default = action(&json["defaultAction"], &json["defaultErrnoRet"]);
        let lenient = ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE"];
        let mut reading = Self {
            default,
            strict: !lenient.contains(&json["defaultAction"].as_str().unwrap()),
            listed: list(&json["architectures"]).iter().map(text).collect(),
            rules: Default::default(),
            last: [None; 3],
        };
        for rule in list(&json["syscalls"]) {
            let value = action(&rule["action"], &rule["errnoRet"]);
            let number = |arg: &Value, key: &str| arg[key].as_u64().unwrap_or(0);
            let conditions: Vec<Condition> = list(&rule["args"])
                .iter()
                .map(|arg| {
                    (
                        number(arg, "index") as usize,
                        text(&arg["op"]),
                        number(arg, "value"),
                        number(arg, "valueTwo"),
                    )
                })
                .collect();
            let mut arguments: Vec<_> = conditions.iter().map(|condition| condition.0).collect();
            arguments.sort_unstable();
            let repeated = arguments.windows(2).any(|pair| pair[0] == pair[1]);
            let alternatives: Vec<Vec<_>> = if repeated {
                conditions.into_iter().map(|one| vec![one]).collect()
            } else {
                vec![conditions]
            };
            for name in list(&rule["names"]) {
                reading.add(name.as_str().unwrap(), Rule(value, alternatives.clone()));
            }
        }
        reading
    }

    fn add(&mut self, name: &str, rule: Rule) {
        let call = SYSCALLS.iter().find(|call| call.0 == name);
        let numbers = call.map_or([u32::MAX; 3], |call| [call.1, call.2, call.3]);
        for (column, number) in numbers.into_iter().enumerate().filter(|(_, number)| *number != u32::MAX) {
            let number = if column == 2 { number | X32_BIT } else { number };
            self.last[column] = self.last[column].max(Some(number));
            if rule.0 != self.default {
                self.rules[column].entry(number).or_default().push(rule.clone());
            }
        }
        if let Some((multiplexer, mask, selected)) = multiplexed_call(name)
            && rule.0 != self.default
        {
            let selector = (0, "SCMP_CMP_MASKED_EQ".to_owned(), mask, selected);
            let select = |conditions: &Vec<Condition>| {
                let own = conditions.iter().filter(|condition| condition.0 != 0).cloned();
                std::iter::once(selector.clone()).chain(own).collect()
            };
            let alternatives = rule.1.iter().map(select).collect();
            self.rules[1].entry(multiplexer).or_default().push(Rule(rule.0, alternatives));
        }
    }

    fn lists(&self, name: &str) -> bool {
        self.listed.iter().any(|listed| listed == name)
    }

    /// The profile's own answer.
    fn answer(&self, arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let x32 = self.lists("SCMP_ARCH_X32");
        let column = match (arch, number & X32_BIT != 0) {
            (AUDIT_ARCH_X86_64, false) => 0,
            (AUDIT_ARCH_I386, _) if self.lists("SCMP_ARCH_X86") => 1,
            (AUDIT_ARCH_X86_64, true) if x32 => 2,
            (AUDIT_ARCH_X86_64, true) if number == u32::MAX => return self.default,
            _ => return KILL_THREAD,
        };
        if self.strict && self.last[column].is_some_and(|last| number > last) {
            return ENOSYS;
        }
        if arch == AUDIT_ARCH_X86_64 && number >= 1 << 31 && !x32 {
            return KILL_THREAD;
        }
        let rules = self.rules[column].get(&number).map(Vec::as_slice).unwrap_or_default();
        let always = |rule: &&Rule| rule.1.iter().any(Vec::is_empty);
        let narrow = |value: u64| if column == 0 { value } else { value & 0xffff_ffff };
        let holds = |(argument, operator, value, second): &Condition| {
            let (given, value, second) = (narrow(args[*argument]), narrow(*value), narrow(*second));
            match operator.as_str() {
                "SCMP_CMP_NE" => given != value,
                "SCMP_CMP_LT" => given < value,
                "SCMP_CMP_LE" => given <= value,
                "SCMP_CMP_EQ" => given == value,
                "SCMP_CMP_GE" => given >= value,
                "SCMP_CMP_GT" => given > value,
                "SCMP_CMP_MASKED_EQ" => given & value == second & value,
                other => panic!("{other}"),
            }
        };
        rules
            .iter()
            .find(always)
            .or_else(|| {
                rules.iter().find(|rule| rule.1.iter().any(|conditions| conditions.iter().all(holds)))
            })
            .map_or(self.default, |rule| rule.0)
    }
}

fn multiplexed_call(name: &str) -> Option<(u32, u64, u64)> {
    let sockets = "socket bind connect listen accept getsockname getpeername socketpair send recv sendto recvfrom \
                   shutdown setsockopt getsockopt sendmsg recvmsg accept4 recvmmsg sendmmsg";
    if let Some(n) = sockets.split(' ').filter(|call| !call.is_empty()).position(|call| call == name) {
        return Some((102, u64::MAX, n as u64 + 1));
    }
    let ipc = [
        ("semop", 1),
        ("semget", 2),
        ("semctl", 3),
        ("semtimedop", 4),
        ("msgsnd", 11),
        ("msgrcv", 12),
        ("msgget", 13),
        ("msgctl", 14),
        ("shmat", 21),
        ("shmdt", 22),
        ("shmget", 23),
        ("shmctl", 24),
    ];
    ipc.iter().find(|(call, _)| *call == name).map(|(_, n)| (117, 0xffff, *n))
}

fn action(action: &Value, errno: &Value) -> u32 {
    let errno = errno.as_u64().unwrap_or(1) as u32;
    match action.as_str().unwrap() {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => 0,
        "SCMP_ACT_KILL_PROCESS" => 0x8000_0000,
        "SCMP_ACT_TRAP" => 0x0003_0000,
        "SCMP_ACT_ERRNO" => 0x0005_0000 | errno,
        "SCMP_ACT_TRACE" => 0x7ff0_0000 | errno,
        "SCMP_ACT_LOG" => 0x7ffc_0000,
        "SCMP_ACT_ALLOW" => ALLOW,
        other => panic!("{other}"),
    }
}

/// Every call there is and some there are not, of every ABI.
fn all_calls() -> impl Iterator<Item = (u32, u32)> {
    let numbers = (0..600).chain([1000, X32_BIT - 1, 1 << 31, u32::MAX - 1, u32::MAX, 0xbfff_ffff]);
    numbers.flat_map(|number| {
        [
            (AUDIT_ARCH_X86_64, number),
            (AUDIT_ARCH_X86_64, number | X32_BIT),
            (AUDIT_ARCH_I386, number),
            (AUDIT_ARCH_AARCH64, number),
        ]
    })
}

fn check(json: &Value, arguments: &[[u64; 6]]) {
    let (program, reading) = (compiled(json), Reading::new(json));
    for (arch, number) in all_calls() {
        for args in arguments {
            let (found, _) = run(&program, arch, number, *args);
            let wanted = reading.answer(arch, number, *args);
            assert_eq!(
                found, wanted,
                "{found:#x} instead of {wanted:#x} for {number:#x} of {arch:#x} with {args:x?} by {json}"
            );
        }
    }
}

/// Some on either side of every value a default profile compares with.
fn arguments() -> Vec<[u64; 6]> {
    let values = [
        0,
        1,
        2,
        8,
        9,
        16,
        39,
        40,
        41,
        0x2_0000,
        0x2_0008,
        0x7e02_0000,
        0x1_0000_0000,
        0xffff_ffff,
        u64::MAX,
    ];
    values.iter().map(|&value| [value, 0, 5, 0x7e02_0000, value, 3]).collect()
}

fn containerd() -> Value {
    serde_json::from_str(include_str!("testdata/containerd-1.6.json")).unwrap()
}

/// What Docker 24's differs in from containerd's, for a container without
/// further capabilities.
fn docker() -> Value {
    let mut profile = containerd();
    profile["defaultErrnoRet"] = json!(1);
    let rules = profile["syscalls"].as_array_mut().unwrap();
    for rule in rules.iter_mut() {
        let names = rule["names"].as_array_mut().unwrap();
        names.retain(|name| name != "socket" && name != "clone" && name != "personality");
    }
    rules.retain(|rule| !rule["names"].as_array().unwrap().is_empty());
    rules.push(json!({"names": ["socket"], "action": "SCMP_ACT_ALLOW",
        "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]}));
    for persona in [0u32, 8, 0x2_0000, 0x2_0008, u32::MAX] {
        rules.push(json!({"names": ["personality"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": persona, "op": "SCMP_CMP_EQ"}]}));
    }
    rules.push(json!({"names": ["clone"], "action": "SCMP_ACT_ALLOW",
        "args": [{"index": 0, "value": 0x7e02_0000u32, "op": "SCMP_CMP_MASKED_EQ"}]}));
    rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}));
    profile
}

#[test]
fn default_profiles_mean_what_they_say() {
    check(&containerd(), &arguments());
    check(&docker(), &arguments());
}

#[test]
fn default_profiles_are_found_in_few_steps() {
    for (json, most_steps) in [(containerd(), 20), (docker(), 20)] {
        let program = compiled(&json);
        let steps = all_calls().map(|(arch, number)| run(&program, arch, number, [0; 6]).1).max().unwrap();
        println!("{} instructions, at most {steps} of them run", program.len() / 8);
        assert!(steps <= most_steps, "{steps}");
        assert!(program.len() / 8 < 1000, "{}", program.len() / 8);
    }
}

#[test]
fn what_containerd_forbids_is_forbidden() {
    let program = compiled(&containerd());
    let call = |name: &str, arg| {
        run(&program, AUDIT_ARCH_X86_64, table::numbers(name).unwrap()[0].unwrap(), [arg, 0, 0, 0, 0, 0]).0
    };
    for forbidden in [
        "mount",
        "umount2",
        "unshare",
        "setns",
        "keyctl",
        "add_key",
        "bpf",
        "reboot",
        "init_module",
        "kexec_load",
    ] {
        assert_eq!(call(forbidden, 0), EPERM, "{forbidden}");
    }
    for allowed in ["read", "execve", "socket", "openat", "fork"] {
        assert_eq!(call(allowed, 0), ALLOW, "{allowed}");
    }
    assert_eq!((call("clone", 0x11), call("clone", 0x1000_0000)), (ALLOW, EPERM));
    assert_eq!(run(&program, AUDIT_ARCH_X86_64, 5000, [0; 6]).0, ENOSYS);
}

/// A generator of the tests' own; the same numbers every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn one_of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len() as u64) as usize]
    }
}

#[test]
fn profiles_nobody_thought_of_mean_what_they_say() {
    const ACTIONS: [&str; 8] = [
        "SCMP_ACT_KILL",
        "SCMP_ACT_KILL_THREAD",
        "SCMP_ACT_KILL_PROCESS",
        "SCMP_ACT_TRAP",
        "SCMP_ACT_ERRNO",
        "SCMP_ACT_TRACE",
        "SCMP_ACT_LOG",
        "SCMP_ACT_ALLOW",
    ];
    const OPERATORS: [&str; 7] = [
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_EQ",
        "SCMP_CMP_GE",
        "SCMP_CMP_GT",
        "SCMP_CMP_MASKED_EQ",
    ];
    const VALUES: [u64; 9] =
        [0, 1, 2, 0x7fff_ffff, 0xffff_ffff, 0x1_0000_0000, 0x1_0000_0001, 0xffff_ffff_0000_0001, u64::MAX];
    const ARCHES: [&str; 5] =
        ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_NATIVE", "SCMP_ARCH_AARCH64"];
    let mut random = Random(7);
    for _ in 0..60 {
        let mut rules = Vec::new();
        for _ in 0..random.below(60) {
            let names: Vec<_> = (0..=random.below(4)).map(|_| random.one_of(SYSCALLS).0).collect();
            let args: Vec<_> = (0..random.below(4))
                .map(|_| {
                    json!({"index": random.below(6), "op": random.one_of(&OPERATORS),
                        "value": random.one_of(&VALUES), "valueTwo": random.one_of(&VALUES)})
                })
                .collect();
            let mut rule = json!({"names": names, "action": random.one_of(&ACTIONS), "args": args});
            if random.below(3) == 0 {
                rule["errnoRet"] = random.below(200).into();
            }
            rules.push(rule);
        }
        let architectures: Vec<_> = ARCHES.iter().filter(|_| random.below(2) == 0).collect();
        let json = json!({"defaultAction": random.one_of(&ACTIONS), "architectures": architectures, "syscalls": rules});
        let arguments: Vec<_> = (0..4).map(|_| [0; 6].map(|_| *random.one_of(&VALUES))).collect();
        check(&json, &arguments);
    }
}

#[test]
fn far_jumps_arrive() {
    // A chain of its own for every call: the tree's halves lie far apart.
    let rules: Vec<_> = SYSCALLS
        .iter()
        .enumerate()
        .map(|(n, call)| {
            json!({"names": [call.0], "action": "SCMP_ACT_ERRNO", "errnoRet": n % 120 + 2,
                "args": [{"index": 1, "value": n, "op": "SCMP_CMP_EQ"}]})
        })
        .collect();
    let json = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules});
    check(&json, &[[0, 0, 0, 0, 0, 0], [0, 100, 0, 0, 0, 0], [0, 300, 0, 0, 0, 0]]);
}

#[test]
fn a_profile_too_long_for_the_kernel_is_refused() {
    let args: Vec<_> =
        (0..6).map(|index| json!({"index": index, "value": u64::MAX, "op": "SCMP_CMP_LT"})).collect();
    let names: Vec<_> = SYSCALLS.iter().map(|call| call.0).collect();
    let json = json!({"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "args": args}]});
    let error = compile(&profile(&json)).unwrap_err().to_string();
    assert!(error.ends_with("the kernel takes at most 4096"), "{error}");
}

#[test]
fn an_empty_profile_is_its_default() {
    for json in [
        json!({"defaultAction": "SCMP_ACT_ALLOW"}),
        json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 22}),
    ] {
        check(&json, &[[0; 6]]);
    }
}

#[test]
fn names_nobody_knows_are_skipped() {
    let json = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
        {"names": ["read", "no_such_call", "swapcontext"], "action": "SCMP_ACT_ALLOW"}]});
    let program = compiled(&json);
    assert_eq!(run(&program, AUDIT_ARCH_X86_64, 0, [0; 6]).0, ALLOW);
}

#[test]
fn flags_are_the_kernels() {
    let flags = |value: Value| {
        let json = json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": value});
        compile(&profile(&json)).unwrap().flags
    };
    assert_eq!(flags(Value::Null), 4);
    assert_eq!(flags(json!([])), 0);
    assert_eq!(flags(json!(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"])), 2);
    assert_eq!(flags(json!(["SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"])), 4);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let listener = "a listener on the host cannot serve the processes of a guest";
    for (json, wanted) in [
        (json!({"defaultAction": "SCMP_ACT_NOTIFY"}), format!("defaultAction: {listener}")),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]}),
            format!("syscalls[0].action: {listener}"),
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/agent.sock"}),
            format!("listenerPath: {listener}"),
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 70000}),
            "defaultErrnoRet: must be an error number up to 65535, is 70000".into(),
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}),
            "syscalls[0].args[0].index: must be 0 to 5, is 6".into(),
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read", ""], "action": "SCMP_ACT_KILL"}]}),
            "syscalls[0].names[1]: is empty; it must be a system call".into(),
        ),
    ] {
        assert_eq!(compile(&profile(&json)).unwrap_err().to_string(), wanted);
    }
}

#[test]
fn the_table_can_be_searched() {
    assert!(SYSCALLS.is_sorted_by(|a, b| a.0 < b.0));
    assert_eq!(table::numbers("execve"), Some([Some(59), Some(11), Some(520)]));
    assert_eq!(table::numbers("socketcall"), Some([None, Some(102), None]));
    assert_eq!(table::numbers("mseal"), Some([Some(462); 3]));
    assert_eq!(table::numbers("no_such_call"), None);
}
