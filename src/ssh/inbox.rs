//! What waits for one visitor: large pieces as they came, small ones gathered,
//! so that a peer that sends byte by byte costs bytes.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

/// A piece of at least this keeps the buffer that it came in; a smaller one would
/// hold up many times its size, and is copied.
const WHOLE: usize = 16 << 10;

/// The bytes that wait for one reader.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Only ever one, the first: a reader that keeps up finds it alone.
    whole: Bytes,
    copied: VecDeque<BytesMut>,
    len: usize,
}

/// Copies are gathered in pieces of this.
const GATHER: usize = 32 << 10;

impl Inbox {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push(&mut self, data: Bytes) {
        if self.len == 0 && data.len() >= WHOLE {
            self.len = data.len();
            self.whole = data;
            return;
        }
        self.push_copied(&data);
    }

    pub(super) fn push_copied(&mut self, mut data: &[u8]) {
        // A reader that does not keep up must not hold other visitors' bytes.
        if !self.whole.is_empty() && self.copied.is_empty() {
            let whole = std::mem::take(&mut self.whole);
            self.copied.push_back(BytesMut::from(&*whole));
        }
        self.len += data.len();
        while !data.is_empty() {
            let room = self.copied.back().map_or(0, |last| GATHER.saturating_sub(last.len()));
            if room == 0 {
                self.copied.push_back(BytesMut::new());
                continue;
            }
            let (now, later) = data.split_at(room.min(data.len()));
            if let Some(last) = self.copied.back_mut() {
                last.extend_from_slice(now);
            }
            data = later;
        }
    }

    /// Takes up to `max` bytes, as they lie.
    pub(super) fn pop(&mut self, max: usize) -> Bytes {
        let piece = if self.whole.is_empty() {
            let Some(first) = self.copied.front_mut() else { return Bytes::new() };
            if first.len() <= max {
                self.copied.pop_front().unwrap_or_default().freeze()
            } else {
                let piece = Bytes::copy_from_slice(first.get(..max).unwrap_or_default());
                first.advance(piece.len());
                piece
            }
        } else {
            self.whole.split_to(max.min(self.whole.len()))
        };
        self.len -= piece.len();
        if self.len == 0 {
            *self = Self::default();
        }
        piece
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let mut inbox = Inbox::default();
        let all: Vec<u8> = (0..200_000u32).map(|n| (n * 7 % 251) as u8).collect();
        let (mut sent, mut read) = (0, Vec::new());
        for (n, step) in [1, 20_000, 5, 40_000, 3, 70_000, 16_384, 1, 30_000].into_iter().enumerate() {
            inbox.push(Bytes::copy_from_slice(&all[sent..sent + step]));
            sent += step;
            if n % 3 == 1 {
                read.extend_from_slice(&inbox.pop(10_000));
            }
        }
        assert_eq!(inbox.len(), sent - read.len());
        while inbox.len() > 0 {
            read.extend_from_slice(&inbox.pop(9_999));
        }
        assert!(read == all[..sent] && inbox.pop(1).is_empty());
    }

    #[test]
    fn a_slow_reader_holds_no_buffer_of_others() {
        let mut inbox = Inbox::default();
        let shared = Bytes::from(vec![1; 64 << 10]);
        inbox.push(shared.slice(..32 << 10));
        assert!(!shared.is_unique());
        inbox.push(shared.slice(32 << 10..));
        assert!(shared.is_unique());
        for _ in 0..100_000 {
            inbox.push_copied(b"x");
        }
        assert!(inbox.copied.iter().map(BytesMut::capacity).sum::<usize>() < 2 * inbox.len());
    }
}
