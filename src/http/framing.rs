//! Follows where each message of an HTTP/1 connection begins and ends, and
//! finds the first byte at which two readers could disagree about it. Pure;
//! hyper parses the messages, this only makes it refuse what it would mend.

/// The longest value of a framing field that can be a good one, in bytes.
const VALUE_MAX: usize = 32;

/// The place of a visitor's bytes in the messages they make.
#[derive(Debug, Clone)]
pub struct Framing {
    at: At,
    /// The last byte was a CR whose LF must follow.
    cr: bool,
    head: Head,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before or in a request line.
    RequestLine { empty: bool },
    /// At the start of a field line.
    LineStart,
    /// In a field's name.
    Name,
    /// In a field's value.
    Value,
    /// In a body with this much left.
    Length(u64),
    /// In a chunk's size, with so many digits seen.
    Size { size: u64, digits: u8 },
    /// In a chunk's extensions.
    Extension { size: u64 },
    /// In a chunk's bytes.
    Chunk(u64),
    /// At the CRLF behind a chunk.
    ChunkEnd,
    /// Past an upgrade: what follows may not be HTTP.
    Opaque,
    /// Past a byte that was refused.
    Refused,
}

/// What the head so far says about what follows it.
#[derive(Debug, Clone, Default)]
struct Head {
    trailers: bool,
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
    field: Field,
    /// The name, then the value, of the present line, cut off.
    text: Vec<u8>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Field {
    #[default]
    Other,
    ContentLength,
    TransferEncoding,
    Upgrade,
}

impl Default for Framing {
    fn default() -> Self {
        Self { at: At::RequestLine { empty: true }, cr: false, head: Head::default() }
    }
}

impl Framing {
    /// Reads on. The first byte after which the message is not clear, by its
    /// index in `bytes`; nothing after it is looked at.
    ///
    /// # Errors
    /// That index. Where it is in a head, the head is not complete yet.
    pub fn read(&mut self, bytes: &[u8]) -> Result<(), usize> {
        let mut rest = bytes;
        while let Some((byte, after)) = rest.split_first() {
            // Bodies are skipped, not read.
            let skipped = match &mut self.at {
                // Of most values nothing counts but that they end.
                At::Value if self.head.field == Field::Other && !self.cr => printable(rest),
                At::Length(left) | At::Chunk(left) => {
                    let n = usize::try_from(*left).map_or(rest.len(), |left| left.min(rest.len()));
                    *left -= n as u64;
                    n
                }
                At::Opaque | At::Refused => return Ok(()),
                _ => 0,
            };
            if skipped > 0 {
                rest = rest.get(skipped..).unwrap_or_default();
                match self.at {
                    At::Length(0) => self.begin(),
                    At::Chunk(0) => self.at = At::ChunkEnd,
                    _ => {}
                }
                continue;
            }
            if self.step(*byte).is_none() {
                self.at = At::Refused;
                return Err(bytes.len() - rest.len());
            }
            rest = after;
        }
        Ok(())
    }

    /// Whether all that was read are whole messages, and what follows is a head.
    pub fn is_between(&self) -> bool {
        self.at == At::RequestLine { empty: true } && !self.cr
    }

    fn begin(&mut self) {
        self.at = At::RequestLine { empty: true };
        let mut text = std::mem::take(&mut self.head.text);
        text.clear();
        self.head = Head { text, ..Head::default() };
    }

    /// One byte of a head or of a chunk's frame; `None` where it makes the
    /// message unclear.
    fn step(&mut self, byte: u8) -> Option<()> {
        // RFC 9112 §2.2: a lone CR or LF ends a line for some and not for others.
        match (self.cr, byte) {
            (false, b'\r') => {
                self.cr = true;
                return Some(());
            }
            (true, b'\n') => {
                self.cr = false;
                return self.line_end();
            }
            (true, _) | (false, b'\n') => return None,
            (false, _) => {}
        }
        // RFC 9110 §5.5: NUL and the other control characters are dangerous everywhere.
        if (byte < b' ' && byte != b'\t') || byte == 0x7f {
            return None;
        }
        match self.at {
            At::RequestLine { .. } => {
                // A fragment is never sent (RFC 9112 §3.2), and dropped by some.
                if byte == b'#' || byte == b'\t' {
                    return None;
                }
                self.at = At::RequestLine { empty: false };
            }
            At::LineStart | At::Name => {
                // An obsolete line fold, or space before the colon (RFC 9112 §5.1, §5.2).
                if byte == b':' && self.at == At::Name {
                    self.named();
                    self.at = At::Value;
                } else if is_token(byte) {
                    self.head.push(byte.to_ascii_lowercase());
                    self.at = At::Name;
                } else {
                    return None;
                }
            }
            At::Value => self.head.push(byte),
            At::Size { size, digits } => match (byte as char).to_digit(16) {
                // Fifteen digits: far beyond any body, and no overflow.
                Some(digit) if digits < 15 => {
                    self.at = At::Size { size: size << 4 | u64::from(digit), digits: digits + 1 };
                }
                None if digits > 0 && matches!(byte, b';' | b' ' | b'\t') => self.at = At::Extension { size },
                _ => return None,
            },
            At::Extension { .. } => {}
            At::ChunkEnd | At::Length(_) | At::Chunk(_) | At::Opaque | At::Refused => return None,
        }
        Some(())
    }

    fn named(&mut self) {
        self.head.field = match self.head.text.as_slice() {
            b"content-length" => Field::ContentLength,
            b"transfer-encoding" => Field::TransferEncoding,
            b"upgrade" => Field::Upgrade,
            _ => Field::Other,
        };
        self.head.text.clear();
    }

    fn line_end(&mut self) -> Option<()> {
        match self.at {
            // RFC 9112 §2.2: empty lines before a request are ignored.
            At::RequestLine { empty: true } => {}
            At::RequestLine { empty: false } => self.at = At::LineStart,
            At::LineStart => self.head_end(),
            At::Value => {
                self.head.line_end()?;
                self.at = At::LineStart;
            }
            At::Size { size, digits: 1.. } | At::Extension { size } => {
                self.at = if size == 0 { At::LineStart } else { At::Chunk(size) };
                self.head.trailers = true;
            }
            At::ChunkEnd => self.at = At::Size { size: 0, digits: 0 },
            _ => return None,
        }
        Some(())
    }

    fn head_end(&mut self) {
        match (&self.head, self.head.length) {
            (Head { trailers: true, .. }, _) => self.begin(),
            (Head { chunked: true, .. }, _) => self.at = At::Size { size: 0, digits: 0 },
            (_, Some(length @ 1..)) => self.at = At::Length(length),
            (Head { upgrade: true, .. }, _) => self.at = At::Opaque,
            _ => self.begin(),
        }
    }
}

impl Head {
    fn push(&mut self, byte: u8) {
        if self.text.len() <= VALUE_MAX {
            self.text.push(byte);
        }
    }

    /// A field line is complete. RFC 9112 §6.1, §6.3: one length or one coding,
    /// once, and the only coding that can be undone here.
    fn line_end(&mut self) -> Option<()> {
        let value = self.text.trim_ascii();
        let framing = matches!(self.field, Field::ContentLength | Field::TransferEncoding);
        if framing && self.text.len() > VALUE_MAX {
            return None;
        }
        match self.field {
            Field::ContentLength if !self.trailers => {
                let clear = value.iter().all(u8::is_ascii_digit) && value.len() <= 19;
                if !clear || self.length.is_some() || self.chunked {
                    return None;
                }
                self.length = Some(std::str::from_utf8(value).ok()?.parse().ok()?);
            }
            Field::TransferEncoding if !self.trailers => {
                if !value.eq_ignore_ascii_case(b"chunked") || self.length.is_some() || self.chunked {
                    return None;
                }
                self.chunked = true;
            }
            // Framing that comes after the body is nobody's.
            Field::ContentLength | Field::TransferEncoding => return None,
            Field::Upgrade => self.upgrade |= may_switch(value),
            Field::Other => {}
        }
        self.text.clear();
        self.field = Field::Other;
        Some(())
    }
}

/// Whether what follows a request that has this `Upgrade` may not be HTTP/1, and so
/// is not looked at: where no switch follows, the connection must end. `h2c` is
/// never passed on, and some clients ask for it in each request.
pub fn may_switch(upgrade: &[u8]) -> bool {
    !upgrade.trim_ascii().eq_ignore_ascii_case(b"h2c")
}

/// How many bytes come before the first one that is not plain text. By blocks, which
/// the compiler makes vectors of: cookies are most of what visitors send.
fn printable(bytes: &[u8]) -> usize {
    const BLOCK: usize = 16;
    let odd = |byte: &u8| *byte < b' ' || *byte == 0x7f;
    let blocks = bytes.chunks_exact(BLOCK).take_while(|block| !block.iter().fold(false, |any, byte| any | odd(byte)));
    let whole = blocks.count() * BLOCK;
    let rest = bytes.get(whole..).unwrap_or_default();
    whole + rest.iter().position(odd).unwrap_or(rest.len())
}

/// RFC 9110 §5.6.2 `tchar`.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The index of the refused byte, found the same at every split.
    fn refused(text: &str) -> Option<usize> {
        let whole = Framing::default().read(text.as_bytes()).err();
        let mut one_by_one = Framing::default();
        let single = (0..text.len()).find(|i| one_by_one.read(&text.as_bytes()[*i..=*i]).is_err());
        assert_eq!(whole, single, "{text:?}");
        whole
    }

    #[test]
    fn clear_messages_pass_one_after_the_other() {
        for text in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\nX-Tab: a\tb\r\n\r\n",
            "\r\nPOST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n\n\0\r\n#POST / HTTP/1.1\r\ncontent-length:  0  \r\n\r\nGET",
            "POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n5;a=\"b\"\r\n\n\0\r\n#\r\n0a\r\n0123456789\r\n000\r\nX-Sum: 1\r\n\r\nGET / HTTP/1.1\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx",
            "GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n\0\n\r\r",
            "GET / HTTP/1.1\r\nUpgrade: a-protocol-with-quite-a-long-name-of-its-own\r\n\r\n\0\n\r\r",
        ] {
            assert_eq!(refused(text), None, "{text:?}");
        }
    }

    #[test]
    fn what_two_readers_could_frame_differently_is_refused_before_the_head_ends() {
        let long = format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked{}\r\n\r\n", " ".repeat(64) + "x");
        for text in [
            "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length:\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n",
            "GET / HTTP/1.1\nHost: a\n\n",
            "GET / HTTP/1.1\r\nHost: a\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
            "GET / HTTP/1.1\r\nX: a\0\r\n\r\n",
            "GET / HTTP/1.1\r\n: a\r\n\r\n",
            "GET / HTTP/1.1\r\nno colon\r\n\r\n",
            "GET /#x HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nUpgrade: h2c\r\n\r\nGET / HTTP/1.1\nHost: a\n\n",
            &long,
        ] {
            let at = refused(text).unwrap_or_else(|| panic!("{text:?} passed"));
            assert!(at < text.len() - 2, "{text:?} at {at}");
        }
        let chunked = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        for body in [
            "\r\n",
            ";x\r\n",
            "+1\r\nx\r\n",
            "0x1\r\n",
            "1\nx\r\n",
            "1\r\nxy\r\n",
            "1\r\nx\n",
            "1000000000000000\r\n",
            "1;a\nb\r\nx\r\n",
            "0\r\n folded: x\r\n",
            "0\r\nContent-Length: 1\r\n\r\n",
            "0\r\nx\n\r\n",
        ] {
            assert!(refused(&format!("{chunked}{body}")).is_some(), "{body:?}");
        }
    }
}
