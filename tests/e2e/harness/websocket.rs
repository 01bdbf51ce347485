//! As much of RFC 6455 as an echo needs, on both sides, written apart from the
//! code that it tests: unfragmented data frames, masks, close.

use aws_lc_rs::digest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Io, read_answer};

/// One end of a WebSocket.
pub struct WebSocket {
    io: Io,
    mask: bool,
}

impl WebSocket {
    /// The server's end of an upgraded connection.
    pub fn server(io: impl super::visitor::ReadWrite + 'static) -> Self {
        Self { io: Box::new(io), mask: false }
    }

    /// The visitor's end of an upgraded connection.
    pub fn client(io: Io) -> Self {
        Self { io, mask: true }
    }

    /// Upgrades a visitor's connection.
    pub async fn connect(mut io: Io, host: &str, path: &str) -> Self {
        let key = "dGhlIHNhbXBsZSBub25jZQ==";
        let head = format!(
            "GET {path} HTTP/1.1\r\nhost: {host}\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: {key}\r\n\r\n"
        );
        io.write_all(head.as_bytes()).await.unwrap();
        io.flush().await.unwrap();
        let (status, headers) = read_answer(&mut io).await;
        assert_eq!(status, 101, "{headers}");
        let accept = accept_of(key.as_bytes());
        assert!(headers.lines().any(|l| l.to_lowercase().starts_with("sec-websocket-accept:") && l.ends_with(&accept)));
        Self { io, mask: true }
    }

    /// The next message with its opcode; none at the end.
    pub async fn read(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        self.io.read_exact(&mut head).await.ok()?;
        let length = match head[1] & 0x7f {
            126 => u64::from(self.io.read_u16().await.ok()?),
            127 => self.io.read_u64().await.ok()?,
            short => u64::from(short),
        };
        let mut mask = [0; 4];
        if head[1] & 0x80 != 0 {
            self.io.read_exact(&mut mask).await.ok()?;
        }
        let mut message = vec![0; usize::try_from(length).unwrap()];
        self.io.read_exact(&mut message).await.ok()?;
        for (i, byte) in message.iter_mut().enumerate() {
            *byte ^= mask[i % 4];
        }
        Some((head[0] & 0xf, message))
    }

    /// Sends one message.
    pub async fn write(&mut self, opcode: u8, message: &[u8]) {
        let mut frame = vec![0x80 | opcode];
        let masked = if self.mask { 0x80 } else { 0 };
        match message.len() {
            n @ ..126 => frame.push(masked | n as u8),
            n @ ..65536 => {
                frame.push(masked | 126);
                frame.extend((n as u16).to_be_bytes());
            }
            n => {
                frame.push(masked | 127);
                frame.extend((n as u64).to_be_bytes());
            }
        }
        let mask = if self.mask { [1, 2, 3, 4] } else { [0; 4] };
        if self.mask {
            frame.extend(mask);
        }
        frame.extend(message.iter().enumerate().map(|(i, b)| b ^ mask[i % 4]));
        let _ = self.io.write_all(&frame).await;
        let _ = self.io.flush().await;
    }
}

/// `Sec-WebSocket-Accept` for a key (RFC 6455 §4.2.2).
pub fn accept_of(key: &[u8]) -> String {
    let text = [key, b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"].concat();
    base64(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &text).as_ref())
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * i) & 63) as usize] as char;
            text.push(if i <= chunk.len() { letter } else { '=' });
        }
    }
    text
}

#[test]
fn the_accept_of_the_rfc_s_example_is_right() {
    assert_eq!(accept_of(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
}
