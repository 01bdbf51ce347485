//! OCSP responses to be stapled (RFC 6960, RFC 6066 §8): whether one is worth
//! showing, and until when. Its signature is for visitors to verify.

use x509_parser::asn1_rs::{Any, Class, FromDer, Tag};
use x509_parser::time::ASN1Time;

/// Real ones have 0.5 to 4 KiB; every full handshake carries it.
const MAX_LEN: usize = 16 << 10;
/// id-pkix-ocsp-basic, 1.3.6.1.5.5.7.48.1.1, without tag and length.
const BASIC: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 48, 1, 1];

/// From when to when (seconds since 1970) a response says that the certificate
/// with this serial number is good.
///
/// # Errors
/// What keeps it from being shown to visitors.
pub fn good_for(der: &[u8], serial: &[u8]) -> Result<(i64, i64), String> {
    if der.len() > MAX_LEN {
        return Err(format!("has {} bytes, more than {MAX_LEN}", der.len()));
    }
    let shape = |what: &str| format!("is not an OCSP response: {what}");
    let (response, rest) = take(der, Tag::Sequence).ok_or_else(|| shape("no SEQUENCE"))?;
    let (status, response) = take(response, Tag::Enumerated).ok_or_else(|| shape("no responseStatus"))?;
    if !rest.is_empty() {
        return Err(shape("bytes after its end"));
    }
    if status != [0] {
        return Err(format!("does not say \"successful\" but status {}", status.first().copied().unwrap_or_default()));
    }
    let basic = basic(response).ok_or_else(|| shape("no basic response in it"))?;
    let singles = singles(basic).ok_or_else(|| shape("no responses in it"))?;
    let single = single_for(singles, serial)
        .ok_or_else(|| shape("a bad response in it"))?
        .ok_or("is for another certificate: not one serial number in it is the leaf's")?;
    match single.status {
        0 => {}
        1 => return Err("says that the certificate is revoked".into()),
        _ => return Err("says that the certificate is not known".into()),
    }
    let until = single.next_update.ok_or("has no nextUpdate: nothing tells when it is out of date")?;
    if until <= single.this_update {
        return Err("has its nextUpdate before its thisUpdate".into());
    }
    Ok((single.this_update, until))
}

/// OCSPResponse after its status, down to BasicOCSPResponse.
fn basic(input: &[u8]) -> Option<&[u8]> {
    let (bytes, rest) = tagged(input, 0)?;
    let (bytes, after) = take(bytes, Tag::Sequence)?;
    let (kind, bytes) = take(bytes, Tag::Oid)?;
    let (octets, tail) = take(bytes, Tag::OctetString)?;
    let (basic, end) = take(octets, Tag::Sequence)?;
    (kind == BASIC && [rest, after, tail, end].iter().all(|rest| rest.is_empty())).then_some(basic)
}

/// The SingleResponses of a BasicOCSPResponse; what signs it must be there.
fn singles(basic: &[u8]) -> Option<&[u8]> {
    let (signed, rest) = take(basic, Tag::Sequence)?;
    let (_, rest) = take(rest, Tag::Sequence)?;
    take(rest, Tag::BitString)?;
    // ResponseData: version [0] (left out for v1), responderID, producedAt.
    let signed = tagged(signed, 0).map_or(signed, |(_, rest)| rest);
    let (_, rest) = tagged(signed, 1).or_else(|| tagged(signed, 2))?;
    let (_, rest) = take(rest, Tag::GeneralizedTime)?;
    Some(take(rest, Tag::Sequence)?.0)
}

struct Single {
    /// 0: good, 1: revoked, 2: unknown.
    status: u32,
    this_update: i64,
    next_update: Option<i64>,
}

/// The response for a serial number; outer `None`: one of them cannot be read.
fn single_for(mut singles: &[u8], serial: &[u8]) -> Option<Option<Single>> {
    while !singles.is_empty() {
        let (single, rest) = take(singles, Tag::Sequence)?;
        singles = rest;
        let (id, single) = take(single, Tag::Sequence)?;
        let (_hash, id) = take(id, Tag::Sequence)?;
        let (_issuer_name, id) = take(id, Tag::OctetString)?;
        let (_issuer_key, id) = take(id, Tag::OctetString)?;
        let (number, _) = take(id, Tag::Integer)?;
        let (status, single) = element(single)?;
        let (this_update, single) = time(single)?;
        let next_update = match tagged(single, 0) {
            Some((next, _)) => Some(time(next)?.0),
            None => None,
        };
        if status.class() != Class::ContextSpecific {
            return None;
        }
        if number == serial {
            return Some(Some(Single { status: status.tag().0, this_update, next_update }));
        }
    }
    Some(None)
}

fn element(input: &[u8]) -> Option<(Any<'_>, &[u8])> {
    let (rest, found) = Any::from_der(input).ok()?;
    Some((found, rest))
}

/// The content of the next element if it has this universal tag, and the rest.
fn take(input: &[u8], tag: Tag) -> Option<(&[u8], &[u8])> {
    let (found, rest) = element(input)?;
    (found.class() == Class::Universal && found.tag() == tag).then_some((found.data, rest))
}

/// The same for `[number]`.
fn tagged(input: &[u8], number: u32) -> Option<(&[u8], &[u8])> {
    let (found, rest) = element(input)?;
    (found.class() == Class::ContextSpecific && found.tag() == Tag(number)).then_some((found.data, rest))
}

fn time(input: &[u8]) -> Option<(i64, &[u8])> {
    let (_, rest) = take(input, Tag::GeneralizedTime)?;
    let (_, time) = ASN1Time::from_der(input).ok()?;
    Some((time.timestamp(), rest))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use time::OffsetDateTime;
    use time::macros::format_description;

    use super::*;

    fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let content = parts.concat();
        let len = u16::try_from(content.len()).unwrap();
        let mut out = vec![tag];
        match len {
            0..128 => out.push(len as u8),
            _ => out.extend([&[0x82][..], &len.to_be_bytes()].concat()),
        }
        out.extend(content);
        out
    }

    fn clock(at: i64) -> Vec<u8> {
        let format = format_description!("[year][month][day][hour][minute][second]Z");
        let text = OffsetDateTime::from_unix_timestamp(at).unwrap().format(format).unwrap();
        tlv(0x18, &[text.as_bytes()])
    }

    /// A response as responders make them, but for its signature.
    pub(in crate::tls) fn response(serial: &[u8], status: u8, this: i64, next: Option<i64>) -> Vec<u8> {
        let hash = tlv(0x30, &[&[6, 5, 0x2b, 14, 3, 2, 26], &[5, 0]]);
        let id = tlv(0x30, &[&hash, &tlv(4, &[&[1; 20]]), &tlv(4, &[&[2; 20]]), &tlv(2, &[serial])]);
        let status = match status {
            1 => tlv(0xa1, &[&clock(this)]),
            other => tlv(0x80 | other, &[]),
        };
        let next = next.map(|at| tlv(0xa0, &[&clock(at)])).unwrap_or_default();
        let single = tlv(0x30, &[&id, &status, &clock(this), &next]);
        let signed = tlv(0x30, &[&tlv(0xa2, &[&tlv(4, &[&[3; 20]])]), &clock(this), &tlv(0x30, &[&single])]);
        let algorithm = tlv(0x30, &[&[6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2]]);
        let basic = tlv(0x30, &[&signed, &algorithm, &tlv(3, &[&[0; 72]])]);
        let bytes = tlv(0x30, &[&tlv(6, &[BASIC]), &tlv(4, &[&basic])]);
        tlv(0x30, &[&[10, 1, 0], &tlv(0xa0, &[&bytes])])
    }

    const SERIAL: &[u8] = &[0, 200, 7];

    #[test]
    fn a_response_that_cannot_be_shown_says_why() {
        let good = response(SERIAL, 0, 1000, Some(2000));
        assert_eq!(good_for(&good, SERIAL), Ok((1000, 2000)));
        for (der, why) in [
            (response(&[1], 0, 1000, Some(2000)), "another certificate"),
            (response(SERIAL, 1, 1000, Some(2000)), "revoked"),
            (response(SERIAL, 2, 1000, Some(2000)), "not known"),
            (response(SERIAL, 0, 1000, None), "no nextUpdate"),
            (response(SERIAL, 0, 1000, Some(1000)), "before its thisUpdate"),
            (tlv(0x30, &[&[10, 1, 3]]), "status 3"),
            (tlv(0x30, &[&[10, 1, 0]]), "no basic response"),
            ([good.as_slice(), &[0]].concat(), "after its end"),
            (b"-----BEGIN".to_vec(), "not an OCSP response"),
            (Vec::new(), "not an OCSP response"),
            (vec![0x30; MAX_LEN + 1], "bytes, more than"),
        ] {
            let error = good_for(&der, SERIAL).unwrap_err();
            assert!(error.contains(why), "{error}: {why}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
            let mut bytes = response(SERIAL, 0, 1000, Some(2000));
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = good_for(&bytes, SERIAL);
            prop_assert!(good_for(&bytes[..cut.index(bytes.len())], SERIAL).is_err());
        }
    }
}
