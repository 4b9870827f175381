//! Devices on the ports of a PC: the serial console and the keyboard
//! controller's reset line.

pub mod console_log;
pub mod i8042;
pub mod serial;
