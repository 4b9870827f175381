//! Registers and configuration space written at random, and a storm of notifications.

use std::os::unix::fs::FileExt;

use super::{Chance, Rounds};
use crate::Result;
use crate::memory::Memory;
use crate::pci;
use crate::virtio::{Device, Queue};

/// Of one device before it is set right and the next has its turn.
const STEPS: u64 = 100;
/// Notifications in a row.
const STORM: u64 = 50;
/// Places of queues' rings in the common configuration: any but this guest's memory,
/// which the device would be right to write to.
const ADDRESSES: std::ops::Range<usize> = 0x20..0x38;
/// Messages of the MSI-X table; any interrupt would be delivered to this very guest.
const MESSAGES: std::ops::Range<usize> = 0x3000..0x3800;
/// The one that kernels expect to come for no reason.
const SPURIOUS: u32 = 0xff;
/// Command and first BAR.
const SET_RIGHT: std::ops::Range<u64> = 0x04..0x14;

pub fn run() -> Result<()> {
    let mut memory = Memory::new()?;
    let mut devices: Vec<(Device, Vec<Queue>, [u8; 16])> = Vec::new();
    for found in pci::all()? {
        let device = Device::take(&found)?;
        let queues = device.start(&mut memory)?;
        let mut right = [0; (SET_RIGHT.end - SET_RIGHT.start) as usize];
        device.function.config.read_exact_at(&mut right, SET_RIGHT.start)?;
        devices.push((device, queues, right));
    }
    let mut chance = Chance(0x5eed);
    let mut rounds = Rounds::start();
    loop {
        for (device, queues, right) in &mut devices {
            for _ in 0..STEPS {
                step(device, queues.len() as u64, &mut chance)?;
            }
            device.function.config.write_all_at(right, SET_RIGHT.start)?;
            device.reset()?;
            device.restart(queues);
            rounds.next();
        }
    }
}

fn step(device: &Device, queues: u64, chance: &mut Chance) -> Result<()> {
    let function = &device.function;
    match chance.below(8) {
        0 => (0..STORM).for_each(|number| device.notify((number % (queues + 1)) as u16)),
        1..5 => {
            let width = 1usize << chance.below(4);
            let offset = chance.below((function.bar_len / width) as u64) as usize * width;
            let value = match offset {
                offset if ADDRESSES.contains(&offset) => chance.next() | 1 << 31 | 1 << 63,
                offset if MESSAGES.contains(&offset) => SPURIOUS.into(),
                _ => chance.next(),
            };
            match width {
                1 => function.put(offset, value as u8),
                2 => function.put(offset, value as u16),
                4 => function.put(offset, value as u32),
                _ => function.put(offset, value),
            }
        }
        5..7 => {
            let offset = chance.below(function.bar_len as u64 / 8) as usize * 8;
            let _: u64 = function.get(offset);
        }
        _ => {
            let width = 1 << chance.below(3);
            let offset = chance.below(256 / width) * width;
            let bytes = chance.next().to_le_bytes();
            function.config.write_all_at(&bytes[..width as usize], offset)?;
        }
    }
    Ok(())
}
