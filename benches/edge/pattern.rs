//! Bytes by position, made once and compared in samples: cheap enough that the
//! load does not hide what it measures.

use std::sync::OnceLock;

use crate::Outcome;

/// The most that is asked for or checked at once, and the size of buffers.
pub const CHUNK: usize = 256 << 10;

/// A prime above CHUNK: no buffer of anyone's divides it, so that a block lost,
/// repeated or swapped is always a mismatch.
const PERIOD: usize = 262_147;

/// Two periods, so that a chunk from any place is one slice.
fn block() -> &'static [u8] {
    static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
    BLOCK.get_or_init(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let next = || {
            // xorshift64*
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
        };
        let period: Vec<u8> = std::iter::repeat_with(next).take(PERIOD).collect();
        period.repeat(2)
    })
}

/// A place in the endless pattern.
#[derive(Debug, Default)]
pub struct Pattern {
    at: u64,
    checks: u64,
}

impl Pattern {
    /// The bytes from here; `advance` by what was sent of them.
    pub fn peek(&self, max: usize) -> &'static [u8] {
        let from = (self.at % PERIOD as u64) as usize;
        &block()[from..from + max.min(CHUNK)]
    }

    /// Goes on by `n` bytes.
    pub fn advance(&mut self, n: usize) {
        self.at += n as u64;
    }

    /// Whether these, at most CHUNK, are the next bytes: both ends each time, so
    /// that nothing is missing, and all of every 16th time.
    ///
    /// # Errors
    /// Where bytes differ.
    pub fn check(&mut self, bytes: &[u8]) -> Outcome<()> {
        const ENDS: usize = 128;
        let expected = self.peek(bytes.len());
        let whole = self.checks.is_multiple_of(16) || bytes.len() <= 2 * ENDS;
        self.checks += 1;
        let tail = bytes.len().saturating_sub(ENDS);
        let right = match whole {
            true => bytes == expected,
            false => bytes[..ENDS] == expected[..ENDS] && bytes[tail..] == expected[tail..],
        };
        if !right {
            return Err(format!("wrong bytes among {} from {}", bytes.len(), self.at).into());
        }
        self.advance(bytes.len());
        Ok(())
    }

    /// How many bytes were made or checked.
    pub fn len(&self) -> u64 {
        self.at
    }
}
