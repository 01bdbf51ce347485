//! What is made up: ids, names and relay ports. Whether somebody has one already is
//! for the records to say; then another is made up.

use crate::tunnel::naming;

/// Relay ports are nobody's OS port; these are none that `ssh -R` means more by.
const RELAY_PORTS: std::ops::Range<u64> = 10_000..60_000;

/// A random id: a UUID of version 4 (RFC 9562 §5.4), as mysocket's are.
pub(super) fn id() -> Option<String> {
    let mut bytes = [0u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    let bits = (u128::from_be_bytes(bytes) & !(0xf << 76) & !(0x3 << 62)) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| hex.get(part).unwrap_or_default());
    Some(parts.join("-"))
}

/// A random name like `twilight-sky-7409`.
pub(super) fn label() -> Option<String> {
    Some(naming::made_up_label(random()?, 10_000))
}

/// A random relay port.
pub(super) fn relay_port() -> Option<u16> {
    let span = RELAY_PORTS.end - RELAY_PORTS.start;
    u16::try_from(RELAY_PORTS.start + u64::from_be_bytes(random()?) % span).ok()
}

/// A random id of an account, which is its SSH user too; none where the system has no
/// random bytes.
pub fn user() -> Option<String> {
    random().map(|bytes| format!("u{}", data_encoding::HEXLOWER.encode(&bytes)))
}

fn random() -> Option<[u8; 8]> {
    let mut bytes = [0u8; 8];
    aws_lc_rs::rand::fill(&mut bytes).ok().map(|()| bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_up_is_well_formed_and_new_each_time() {
        let (one, other) = (id().unwrap(), id().unwrap());
        assert!(one != other && one.len() == 36, "{one}");
        assert_eq!((one.as_bytes()[14], one.split('-').count()), (b'4', 5));
        assert!("89ab".contains(char::from(one.as_bytes()[19])), "{one}");
        let name = label().unwrap();
        let parts: Vec<&str> = name.split('-').collect();
        assert!(parts.len() == 3 && parts[2].parse::<u16>().is_ok_and(|n| n < 10_000), "{name}");
        assert!((0..100).all(|_| relay_port().is_some_and(|port| (10_000..60_000).contains(&port))));
        assert!(user().unwrap().parse::<crate::model::AccountId>().is_ok());
    }
}
