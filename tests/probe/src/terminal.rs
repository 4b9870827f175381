//! Standard streams that may be a terminal.

use std::io::IsTerminal;

use crate::{
    calls::{Shown, address_mut, call},
    out::Out,
};

/// The section.
pub fn print(out: &mut Out) {
    out.section("terminal");
    let streams =
        [std::io::stdin().is_terminal(), std::io::stdout().is_terminal(), std::io::stderr().is_terminal()];
    out.put("streams", format_args!("{streams:?}"));
    let own = std::fs::File::options().read(true).write(true).open("/dev/tty");
    out.put("open_dev_tty", crate::calls::shown(own));
    if streams[0] {
        details(out);
    }
    out.section("");
}

fn details(out: &mut Out) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    let result = call(libc::SYS_ioctl, [0, libc::TIOCGWINSZ as usize, address_mut(&mut size)]);
    out.put("size", format_args!("{} {}x{}", Shown(result), size.ws_col, size.ws_row));
    // The kernel's own struct termios is shorter than the C library's.
    let mut settings = [0u32; 16];
    let result = call(libc::SYS_ioctl, [0, libc::TCGETS as usize, settings.as_mut_ptr() as usize]);
    out.put("settings", format_args!("{} {:x?}", Shown(result), &settings[..4]));
    let mut group = 0i32;
    let result = call(libc::SYS_ioctl, [0, libc::TIOCGPGRP as usize, address_mut(&mut group)]);
    out.put(
        "foreground",
        format_args!("{} {}", Shown(result), Ok(i64::from(group)) == call(libc::SYS_getpgid, [0])),
    );
    let mut session = 0i32;
    let result = call(libc::SYS_ioctl, [0, libc::TIOCGSID as usize, address_mut(&mut session)]);
    out.put(
        "session",
        format_args!("{} {}", Shown(result), Ok(i64::from(session)) == call(libc::SYS_getsid, [0])),
    );
}
