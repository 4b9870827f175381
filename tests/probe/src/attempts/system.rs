//! The kernel itself: clock, modules, keys, tracing, System V objects.

use libc::{
    CLOCK_REALTIME, SYS_acct, SYS_add_key, SYS_adjtimex, SYS_bpf, SYS_clock_gettime, SYS_clock_settime,
    SYS_delete_module, SYS_init_module, SYS_io_uring_setup, SYS_ioperm, SYS_iopl, SYS_kexec_load, SYS_keyctl,
    SYS_landlock_create_ruleset, SYS_mbind, SYS_modify_ldt, SYS_move_pages, SYS_mq_open, SYS_perf_event_open,
    SYS_reboot, SYS_request_key, SYS_semget, SYS_set_mempolicy, SYS_shmget, SYS_swapoff, SYS_swapon,
    SYS_syslog, SYS_userfaultfd,
};

use super::Attempt;
use crate::calls::{address, address_mut, call, signed, text};

pub const ATTEMPTS: &[Attempt] = &[
    ("set_clock_to_now", || {
        let mut now = [0i64; 2];
        call(SYS_clock_gettime, [CLOCK_REALTIME as usize, address_mut(&mut now)])?;
        call(SYS_clock_settime, [CLOCK_REALTIME as usize, address(&now)])
    }),
    ("read_clock_adjustment", || {
        let mut adjustment = [0u8; 256];
        call(SYS_adjtimex, [address_mut(&mut adjustment)])
    }),
    ("adjust_clock_by_nothing", || {
        // struct timex: modes (ADJ_OFFSET), then the offset, 0.
        let mut adjustment = [0u64; 32];
        adjustment[0] = 1;
        call(SYS_adjtimex, [address_mut(&mut adjustment)])
    }),
    // In a pid namespace nothing but restart and halt means anything (reboot(2)).
    ("reboot_ctrl_alt_del", || call(SYS_reboot, [0xfee1_dead, 672_274_793, 0])),
    ("kexec_nothing", || call(SYS_kexec_load, [0, 0, 0, 0])),
    ("load_module", || call(SYS_init_module, [text(c""), 0, text(c"")])),
    ("remove_module", || call(SYS_delete_module, [text(c"no_such_module"), libc::O_NONBLOCK as usize])),
    ("swap_on", || call(SYS_swapon, [text(c"/no/such/file"), 0])),
    ("swap_off", || call(SYS_swapoff, [text(c"/no/such/file")])),
    ("accounting_off", || call(SYS_acct, [0])),
    // SYSLOG_ACTION_SIZE_BUFFER and SYSLOG_ACTION_READ_ALL
    ("kernel_log_size", || call(SYS_syslog, [10, 0, 0])),
    ("kernel_log", || {
        let mut text = [0u8; 64];
        call(SYS_syslog, [3, text.as_mut_ptr() as usize, text.len()])
    }),
    ("io_ports_all", || call(SYS_iopl, [3])),
    ("io_port", || call(SYS_ioperm, [0x80, 1, 1])),
    ("local_descriptor_table", || {
        let mut table = [0u8; 64];
        call(SYS_modify_ldt, [0, table.as_mut_ptr() as usize, table.len()])
    }),
    ("bpf_map", || {
        // BPF_MAP_CREATE: array, keys of 4, values of 4 bytes, 1 entry
        let attributes = [2u32, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        call(SYS_bpf, [0, address(&attributes), size_of_val(&attributes)])
    }),
    ("bpf_device_program", || {
        // BPF_PROG_LOAD: BPF_PROG_TYPE_CGROUP_DEVICE, r0 = 1; exit
        let program = [0x0000_0001_0000_00b7u64, 0x95];
        let attributes = [15u64 | (2 << 32), address(&program) as u64, text(c"GPL") as u64, 0, 0, 0, 0, 0, 0];
        call(SYS_bpf, [5, address(&attributes), size_of_val(&attributes)])
    }),
    ("perf_event", || {
        // PERF_TYPE_SOFTWARE, size of the first version, PERF_COUNT_SW_TASK_CLOCK
        let mut attributes = [0u64; 16];
        attributes[0] = 1 | (64 << 32);
        attributes[1] = 1;
        call(SYS_perf_event_open, [address(&attributes), 0, signed(-1), signed(-1), 0])
    }),
    ("userfaultfd", || call(SYS_userfaultfd, [0])),
    ("io_uring", || {
        let mut parameters = [0u8; 120];
        call(SYS_io_uring_setup, [1, parameters.as_mut_ptr() as usize])
    }),
    // LANDLOCK_CREATE_RULESET_VERSION
    ("landlock", || call(SYS_landlock_create_ruleset, [0, 0, 1])),
    ("session_keyring", || call(SYS_keyctl, [0, signed(-3), 0])),
    ("add_key", || call(SYS_add_key, [text(c"user"), text(c"probe"), text(c"x"), 1, signed(-3)])),
    ("request_key", || call(SYS_request_key, [text(c"user"), text(c"no-such-key"), 0, signed(-3)])),
    ("memory_policy", || call(SYS_set_mempolicy, [0, 0, 0])),
    ("memory_bind", || call(SYS_mbind, [0, 0, 0, 0, 0, 0])),
    ("move_pages", || call(SYS_move_pages, [0, 0, 0, 0, 0, 0])),
    ("message_queue", || {
        let flags = (libc::O_CREAT | libc::O_RDWR) as usize;
        call(SYS_mq_open, [text(c"probe"), flags, 0o600, 0])
    }),
    ("shared_memory", || call(SYS_shmget, [0, 4096, 0o600 | libc::IPC_CREAT as usize])),
    ("shared_memory_huge", || {
        const SHM_HUGETLB: usize = 0o4000;
        call(SYS_shmget, [0, 2 << 20, 0o600 | libc::IPC_CREAT as usize | SHM_HUGETLB])
    }),
    ("semaphore", || call(SYS_semget, [0, 1, 0o600 | libc::IPC_CREAT as usize])),
    ("executable_memory", || {
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        let protection = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as usize;
        call(libc::SYS_mmap, [0, 4096, protection, flags, signed(-1), 0])
    }),
    ("processes_50", || {
        // As many as a limit of 50 leaves no room for.
        let mut started = Vec::new();
        let result = (0..50).try_for_each(|_| {
            let pid = call(libc::SYS_fork, [])?;
            if pid == 0 {
                loop {
                    crate::calls::pause();
                }
            }
            started.push(pid as usize);
            Ok(())
        });
        for pid in started {
            call(libc::SYS_kill, [pid, libc::SIGKILL as usize])?;
            call(libc::SYS_wait4, [pid, 0, 0, 0])?;
        }
        result.map(|()| 0)
    }),
];
