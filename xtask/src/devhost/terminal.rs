//! This process's terminal while a guest's command owns it.

use std::io::Write;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The terminal in raw mode, its size passed on, until dropped.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Keeps SIGWINCH for [`RawTerminal::enter`]; called before any thread is
    /// started, for a thread that does not block it would swallow it.
    pub fn block_resize() -> Result<()> {
        Ok(resize_signal().thread_block()?)
    }

    /// Enters raw mode. Writes the size now and whenever it changes to
    /// `control` as `size ROWS COLUMNS`.
    pub fn enter(mut control: UnixStream) -> Result<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).context("read the terminal's settings")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSADRAIN, &raw).context("set the terminal to raw mode")?;

        send_size(&mut control);
        let resized = resize_signal();
        std::thread::spawn(move || while resized.wait().is_ok() && send_size(&mut control) {});
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, &self.before);
    }
}

fn resize_signal() -> SigSet {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGWINCH);
    signals
}

/// Whether the other side still listens.
fn send_size(control: &mut UnixStream) -> bool {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the ioctl writes one winsize, which `size` is.
    let result = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &mut size) };
    if result != 0 || size.ws_row == 0 {
        return true;
    }
    writeln!(control, "size {} {}", size.ws_row, size.ws_col).is_ok()
}
