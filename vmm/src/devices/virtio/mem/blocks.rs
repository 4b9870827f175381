//! Which blocks of the region are plugged.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A bit for each block, set where it is plugged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Blocks(Vec<u64>);

impl Blocks {
    /// Of so many blocks none is plugged.
    pub(super) fn new(count: u64) -> Self {
        Self(vec![0; count.div_ceil(64) as usize])
    }

    /// Blocks there is room for.
    pub(super) fn len(&self) -> u64 {
        self.0.len() as u64 * 64
    }

    /// How many of `blocks` are plugged; none beyond the last is.
    pub(super) fn count(&self, blocks: Range<u64>) -> u64 {
        let blocks = blocks.start..blocks.end.min(self.len());
        blocks.filter(|block| self.is_plugged(*block)).count() as u64
    }

    fn is_plugged(&self, block: u64) -> bool {
        self.0.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    /// Makes all of `blocks` plugged, or none.
    pub(super) fn set(&mut self, blocks: Range<u64>, plugged: bool) {
        for block in blocks.start..blocks.end.min(self.len()) {
            if let Some(word) = self.0.get_mut((block / 64) as usize) {
                let bit = 1 << (block % 64);
                *word = if plugged { *word | bit } else { *word & !bit };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_across_words() {
        let mut blocks = Blocks::new(130);
        blocks.set(60..70, true);
        blocks.set(127..130, true);
        assert_eq!([blocks.count(0..130), blocks.count(63..65), blocks.count(0..60)], [13, 2, 0]);
        blocks.set(64..128, false);
        assert_eq!(blocks.count(0..u64::MAX), 6);
        blocks.set(u64::MAX - 1..u64::MAX, true);
        assert_eq!((blocks.count(0..u64::MAX), blocks.len()), (6, 192));
    }
}
