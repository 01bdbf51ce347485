//! Bytes by position: made and checked as they flow, so that a hundred
//! megabytes need no buffer and a wrong byte is told with its place.

use std::sync::OnceLock;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// A prime, so that no buffer size of anyone's divides it: a block repeated,
/// lost or swapped is always a mismatch.
const PERIOD: usize = 1_048_573;

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
        std::iter::repeat_with(next).take(PERIOD).collect()
    })
}

/// A place in the endless pattern.
#[derive(Debug, Default)]
pub struct Pattern {
    at: u64,
}

impl Pattern {
    /// The next bytes, at most `max` of them.
    pub fn next(&mut self, max: usize) -> &'static [u8] {
        let from = usize::try_from(self.at % PERIOD as u64).unwrap();
        let chunk = &block()[from..PERIOD.min(from + max)];
        self.at += chunk.len() as u64;
        chunk
    }

    /// Whether these are the next bytes.
    ///
    /// # Errors
    /// Where the first wrong one is.
    pub fn check(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            let from = self.at;
            let expected = self.next(bytes.len());
            let (now, rest) = bytes.split_at(expected.len());
            if now != expected {
                let wrong = now.iter().zip(expected).take_while(|(a, b)| a == b).count();
                return Err(format!("byte {} is wrong", from + wrong as u64));
            }
            bytes = rest;
        }
        Ok(())
    }

    /// How many bytes were made or checked.
    pub fn len(&self) -> u64 {
        self.at
    }

    /// Writes the first `n` bytes of the pattern.
    pub async fn write(n: u64, to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
        let mut pattern = Self::default();
        while pattern.len() < n {
            let max = usize::try_from(n - pattern.len()).unwrap().min(64 << 10);
            to.write_all(pattern.next(max)).await?;
        }
        to.flush().await
    }

    /// Reads `n` bytes, or up to the end, and checks each.
    ///
    /// # Errors
    /// Where it differs, or how it ended.
    pub async fn read(n: Option<u64>, from: &mut (impl AsyncRead + Unpin)) -> Result<u64, String> {
        let mut pattern = Self::default();
        let mut buffer = vec![0; 64 << 10];
        while n.is_none_or(|n| pattern.len() < n) {
            let left = n.map_or(u64::MAX, |n| n - pattern.len());
            let max = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            match from.read(&mut buffer[..max]).await {
                Ok(0) if n.is_none() => break,
                Ok(0) => return Err(format!("ended after {} of {n:?} bytes", pattern.len())),
                Ok(got) => pattern.check(&buffer[..got])?,
                Err(e) => return Err(format!("broke off after {} bytes: {e}", pattern.len())),
            }
        }
        Ok(pattern.len())
    }
}
