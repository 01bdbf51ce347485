//! What waits for one visitor: large pieces as they came, small ones gathered,
//! so that a peer that sends byte by byte costs bytes.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

/// A piece of at least this keeps the block that it came in (`block`); a smaller
/// one would hold up many times its size, and is copied.
pub(super) const WHOLE: usize = 16 << 10;

/// Whole pieces that wait at most; a reader that is further behind must not hold
/// the blocks of others, and gets copies.
const WHOLES: usize = 8;

/// Copies are gathered in pieces of this.
const GATHER: usize = 32 << 10;

/// The bytes that wait for one reader.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    pieces: VecDeque<Piece>,
    len: usize,
    wholes: usize,
    /// Copies only, until it is empty again.
    behind: bool,
}

#[derive(Debug)]
enum Piece {
    Whole(Bytes),
    Copied(BytesMut),
}

impl Inbox {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Takes a piece of a block, of which it is the most or `alone` with its like:
    /// then keeping the block costs little more than a copy would.
    pub(super) fn push(&mut self, data: Bytes, alone: bool) {
        if data.len() < WHOLE || (self.behind && !alone) {
            return self.push_copied(&data);
        }
        if self.wholes >= WHOLES && !alone {
            self.behind = true;
            let pieces = std::mem::take(self).pieces;
            self.behind = true;
            for piece in pieces {
                match piece {
                    Piece::Whole(bytes) => self.push_copied(&bytes),
                    Piece::Copied(bytes) => self.push_copied(&bytes),
                }
            }
            return self.push_copied(&data);
        }
        self.len += data.len();
        self.wholes += 1;
        self.pieces.push_back(Piece::Whole(data));
    }

    pub(super) fn push_copied(&mut self, mut data: &[u8]) {
        self.len += data.len();
        while !data.is_empty() {
            if let Some(Piece::Copied(last)) = self.pieces.back_mut()
                && last.len() < GATHER
            {
                let (now, later) = data.split_at((GATHER - last.len()).min(data.len()));
                last.extend_from_slice(now);
                data = later;
            } else {
                self.pieces.push_back(Piece::Copied(BytesMut::new()));
            }
        }
    }

    /// Takes up to `max` bytes, as they lie.
    pub(super) fn pop(&mut self, max: usize) -> Bytes {
        let piece = match self.pieces.front_mut() {
            None => return Bytes::new(),
            Some(Piece::Whole(bytes)) => bytes.split_to(max.min(bytes.len())),
            Some(Piece::Copied(bytes)) if bytes.len() <= max => std::mem::take(bytes).freeze(),
            Some(Piece::Copied(bytes)) => {
                let piece = Bytes::copy_from_slice(bytes.get(..max).unwrap_or_default());
                bytes.advance(piece.len());
                piece
            }
        };
        self.len -= piece.len();
        match self.pieces.front() {
            Some(Piece::Whole(bytes)) if bytes.is_empty() => {
                self.wholes -= 1;
                self.pieces.pop_front();
            }
            Some(Piece::Copied(bytes)) if bytes.is_empty() => drop(self.pieces.pop_front()),
            _ => {}
        }
        if self.len == 0 {
            self.behind = false;
            if self.pieces.capacity() > 2 * WHOLES {
                self.pieces = VecDeque::new();
            }
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
        let all: Vec<u8> = (0..1_000_000u32).map(|n| (n * 7 % 251) as u8).collect();
        let (mut sent, mut read) = (0, Vec::new());
        for (n, step) in [1, 20_000, 5, 40_000, 3, 70_000, 16_384, 1, 30_000].into_iter().cycle().take(45).enumerate() {
            inbox.push(Bytes::copy_from_slice(&all[sent..sent + step]), n % 4 == 1);
            sent += step;
            if n % 3 == 1 {
                read.extend_from_slice(&inbox.pop(10_000));
            }
        }
        assert_eq!(inbox.len(), sent - read.len());
        while inbox.len() > 0 {
            read.extend_from_slice(&inbox.pop(9_999));
        }
        assert!(read == all[..sent] && inbox.pop(1).is_empty() && inbox.pieces.is_empty() && inbox.wholes == 0);
    }

    #[test]
    fn a_reader_that_is_behind_holds_no_block_of_others() {
        let mut inbox = Inbox::default();
        let shared = Bytes::from(vec![1; WHOLE]);
        for _ in 0..WHOLES {
            inbox.push(shared.clone(), false);
        }
        assert!(!shared.is_unique());
        inbox.push(shared.clone(), false);
        assert!(shared.is_unique());
        for _ in 0..100_000 {
            inbox.push_copied(b"x");
        }
        let kept: usize = inbox.pieces.iter().map(|p| if let Piece::Copied(b) = p { b.capacity() } else { 0 }).sum();
        assert!(kept < 2 * inbox.len(), "{kept}");
        while inbox.len() > 0 {
            inbox.pop(usize::MAX);
        }
        inbox.push(shared.clone(), false);
        assert!(!shared.is_unique(), "a reader that has caught up gets pieces whole again");
    }
}
