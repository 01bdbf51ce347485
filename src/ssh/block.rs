//! Blocks that sessions read into, kept for the next reads: allocating them anew
//! costs a page fault for each 4 KiB (measured: a tenth of a download's CPU).

use parking_lot::Mutex;

/// Bytes of a large block: four packets of bulk in one read.
pub(super) const BLOCK: usize = 128 << 10;

/// Large blocks that are kept, for all sessions.
const KEPT: usize = 64;

static SPARE: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// Memory to read into. Large ones come from and go back to the spare ones.
#[derive(Debug, Default)]
pub(super) struct Block(Box<[u8]>);

impl Block {
    /// At least `size` bytes, with anything in them.
    pub(super) fn of(size: usize) -> Self {
        if size > BLOCK / 2
            && size <= BLOCK
            && let Some(spare) = SPARE.lock().pop()
        {
            return Self(spare);
        }
        let size = if size > BLOCK / 2 { size.max(BLOCK) } else { size };
        Self(vec![0; size].into_boxed_slice())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.0.len() == BLOCK {
            let mut spare = SPARE.lock();
            if spare.len() < KEPT {
                spare.push(std::mem::take(&mut self.0));
            }
        }
    }
}
