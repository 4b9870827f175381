//! A very short round: every input of the corpora, and a few hundred changes of them, the same ones
//! each time.

use std::fs;
use std::path::Path;

use super::*;

/// Changes of each target's corpus.
const ROUNDS: usize = 1000;
/// The longest input.
const MOST: usize = 16384;

/// Numbers that look random (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize
    }

    /// Bytes changed, put in, taken out, doubled, or taken from another.
    fn change(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.next() % 6 {
            let at = self.next() % (input.len() + 1);
            match self.next() % 6 {
                0 if at < input.len() => input[at] = self.next() as u8,
                1 if at < input.len() => input[at] ^= 1 << (self.next() % 8),
                2 => input.insert(at, [0, 1, 0x7f, 0x80, 0xff][self.next() % 5]),
                3 => drop(input.drain(at..(at + self.next() % 9).min(input.len()))),
                4 => {
                    let from = self.next() % (other.len() + 1);
                    let piece = &other[from..(from + self.next() % 64).min(other.len())];
                    drop(input.splice(at..at, piece.iter().copied()));
                }
                _ => input.extend((0..self.next() % 64).map(|n| n as u8).collect::<Vec<_>>()),
            }
        }
        input.truncate(MOST);
    }
}

/// The inputs that are kept, and some of no meaning.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut files: Vec<_> =
        fs::read_dir(dir).into_iter().flatten().map(|file| file.unwrap().path()).collect();
    files.sort();
    let kept = files.into_iter().map(|file| fs::read(file).unwrap());
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    kept.chain((0..4).map(|count| (0..count * 64).map(|_| numbers.next() as u8).collect())).collect()
}

/// One after the other: what one has done is not another's.
#[test]
fn a_short_round_of_each_finds_nothing() {
    for (name, run) in TARGETS {
        let inputs = corpus(name);
        let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
        inputs.iter().for_each(|input| run(input));
        for _ in 0..ROUNDS {
            let mut input = inputs[numbers.next() % inputs.len()].clone();
            let other = &inputs[numbers.next() % inputs.len()];
            numbers.change(&mut input, other);
            run(&input);
        }
    }
}
