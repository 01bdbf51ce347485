//! SSH's data types (RFC 4251 §5), read from hostile bytes and written into a
//! buffer. Which fields a message has is its reader's business.

use super::Fatal;

/// What was expected is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

impl From<Malformed> for Fatal {
    fn from(_: Malformed) -> Self {
        Fatal::MALFORMED
    }
}

/// Reads fields from the front of a message; never past its end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// What has not been read yet.
    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    /// RFC 4251 §5: any other value than 0 is true.
    pub(super) fn bool(&mut self) -> Result<bool, Malformed> {
        Ok(self.u8()? != 0)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(super) fn string(&mut self) -> Result<&'a [u8], Malformed> {
        let len = self.u32()?;
        self.take(usize::try_from(len).map_err(|_| Malformed)?)
    }

    /// A string that must be UTF-8, as user names and addresses are.
    pub(super) fn text(&mut self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.string()?).map_err(|_| Malformed)
    }

    /// A comma-separated list of names.
    pub(super) fn names(&mut self) -> Result<Names<'a>, Malformed> {
        let text = self.text()?;
        if !text.is_ascii() {
            return Err(Malformed);
        }
        Ok(Names(text))
    }

    /// A positive integer's magnitude, without leading zeros.
    pub(super) fn magnitude(&mut self) -> Result<&'a [u8], Malformed> {
        let bytes = self.string()?;
        if bytes.first().is_some_and(|b| b & 0x80 != 0) {
            return Err(Malformed); // negative
        }
        let zeros = bytes.iter().take_while(|b| **b == 0).count();
        bytes.get(zeros..).ok_or(Malformed)
    }
}

/// A name-list.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names<'a>(&'a str);

impl<'a> Names<'a> {
    pub(super) fn iter(self) -> impl Iterator<Item = &'a str> {
        self.0.split(',').filter(|name| !name.is_empty())
    }

    pub(super) fn has(self, wanted: &str) -> bool {
        self.iter().any(|name| name == wanted)
    }
}

/// Writes fields at the end of a message.
pub(super) trait Put {
    fn put_bytes(&mut self, bytes: &[u8]);

    fn put_u8(&mut self, value: u8) {
        self.put_bytes(&[value]);
    }

    fn put_bool(&mut self, value: bool) {
        self.put_u8(u8::from(value));
    }

    fn put_u32(&mut self, value: u32) {
        self.put_bytes(&value.to_be_bytes());
    }

    fn put_string(&mut self, bytes: &[u8]) {
        // Nothing that we write comes near 4 GiB.
        self.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.put_bytes(bytes);
    }

    fn put_names<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) {
        let names: Vec<_> = names.into_iter().collect();
        self.put_string(names.join(",").as_bytes());
    }

    /// A positive integer, from its magnitude.
    fn put_magnitude(&mut self, bytes: &[u8]) {
        let zeros = bytes.iter().take_while(|b| **b == 0).count();
        let bytes = bytes.get(zeros..).unwrap_or_default();
        let sign = usize::from(bytes.first().is_some_and(|b| b & 0x80 != 0));
        self.put_u32(u32::try_from(bytes.len() + sign).unwrap_or(u32::MAX));
        if sign == 1 {
            self.put_u8(0);
        }
        self.put_bytes(bytes);
    }
}

impl Put for Vec<u8> {
    fn put_bytes(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let mut out = Vec::new();
        out.put_u8(7);
        out.put_bool(true);
        out.put_u32(70_000);
        out.put_names(["a", "b"]);
        out.put_magnitude(&[0, 0, 0x80, 1]);
        out.put_string(b"rest");
        let mut read = Reader::new(&out);
        assert_eq!((read.u8(), read.bool(), read.u32()), (Ok(7), Ok(true), Ok(70_000)));
        let names = read.names().unwrap();
        assert!(names.has("b") && !names.has("c") && !names.has(""));
        assert_eq!(names.iter().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(read.magnitude(), Ok(&[0x80, 1][..]));
        assert_eq!(read.string(), Ok(&b"rest"[..]));
        assert_eq!((read.rest(), read.u8()), (&[][..], Err(Malformed)));
    }

    #[test]
    fn no_length_reaches_past_the_end() {
        for bytes in [&[0xff, 0xff, 0xff, 0xff, 1][..], &[0, 0, 0, 2, 1], &[0, 0, 0], &[0, 0, 0, 2, 0xc3, 0x28]] {
            assert_eq!(Reader::new(bytes).text(), Err(Malformed), "{bytes:?}");
        }
        assert_eq!(Reader::new(&[0, 0, 0, 1, 0x80]).magnitude(), Err(Malformed));
    }
}
