//! Reads a tree of named fields (the settings file, a record of the feed) and
//! collects every mistake at once, each with its place, what is wrong and how
//! to mend it. What the fields mean is up to who reads them.

use std::cell::RefCell;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Map, Value};

/// One mistake of the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The field's path, dotted: `ssh.login_deadline`, `hostnames[1]`.
    pub at: String,
    /// What is wrong with it.
    pub problem: String,
    /// What to write instead.
    pub fix: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.at, self.problem, self.fix)
    }
}

/// A value that one field can hold.
pub trait Field: Sized + fmt::Debug {
    /// What a good value looks like, for the fix: `a duration like "10s"`.
    const EXPECTED: &'static str;
    /// # Errors
    /// What is wrong with the value.
    fn from_value(value: &Value) -> Result<Self, String>;
}

/// A key that somebody reads, for the test that holds the documented settings
/// equal to the code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// The key's path, dotted.
    pub at: String,
    /// Its default as `Debug` shows it; none where the key may be left out.
    pub default: Option<String>,
}

/// What all tables of one tree gather.
#[derive(Default)]
struct Gathered {
    mistakes: Vec<Mistake>,
    /// Only where asked for: records are read far too often.
    known: Option<Vec<Known>>,
}

/// The fields of one table, taken one by one; mistakes gather in the root.
pub struct Fields {
    path: String,
    map: Map<String, Value>,
    known: Vec<String>,
    gathered: Rc<RefCell<Gathered>>,
}

impl Fields {
    /// The root table.
    pub fn new(map: Map<String, Value>) -> Self {
        Self { path: String::new(), map, known: Vec::new(), gathered: Rc::default() }
    }

    /// A root table that also remembers every key that is read (`known`).
    pub fn remembering(map: Map<String, Value>) -> Self {
        let fields = Self::new(map);
        fields.gathered.borrow_mut().known = Some(Vec::new());
        fields
    }

    /// Every key read so far in a tree that remembers them.
    pub fn known(&self) -> Vec<Known> {
        self.gathered.borrow().known.clone().unwrap_or_default()
    }

    fn remember(&self, key: &str, default: Option<&dyn fmt::Debug>) {
        if let Some(known) = &mut self.gathered.borrow_mut().known {
            known.push(Known { at: self.at(key), default: default.map(|d| format!("{d:?}")) });
        }
    }

    /// The value at `key`, or `default` where it is absent (or wrong: then the
    /// mistake is recorded and the default only lets reading go on).
    pub fn take<T: Field>(&mut self, key: &str, default: T) -> T {
        self.remember(key, Some(&default));
        self.read(key).unwrap_or(default)
    }

    /// The value at `key`, if it is there and not null.
    pub fn optional<T: Field>(&mut self, key: &str) -> Option<T> {
        self.remember(key, None);
        self.read(key)
    }

    fn read<T: Field>(&mut self, key: &str) -> Option<T> {
        self.known.push(key.to_owned());
        let value = self.map.remove(key).filter(|v| !v.is_null())?;
        match T::from_value(&value) {
            Ok(found) => Some(found),
            Err(problem) => {
                self.mistake(key, problem, format!("write {}", T::EXPECTED));
                None
            }
        }
    }

    /// The value at `key`, which must be there.
    pub fn required<T: Field>(&mut self, key: &str) -> Option<T> {
        if !self.map.contains_key(key) {
            self.known.push(key.to_owned());
            self.mistake(key, "is missing".into(), format!("write {}", T::EXPECTED));
            return None;
        }
        self.optional(key)
    }

    /// The table at `key`, empty where absent.
    pub fn section(&mut self, key: &str) -> Fields {
        self.known.push(key.to_owned());
        let map = match self.map.remove(key) {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(map)) => map,
            Some(other) => {
                self.mistake(key, format!("is {}", kind(&other)), "write a table".into());
                Map::new()
            }
        };
        Fields { path: self.at(key), map, known: Vec::new(), gathered: Rc::clone(&self.gathered) }
    }

    /// The tables of the list at `key`, none where absent.
    pub fn tables(&mut self, key: &str) -> Vec<Fields> {
        self.known.push(key.to_owned());
        let list = match self.map.remove(key) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => list,
            Some(other) => {
                self.mistake(key, format!("is {}, not a list", kind(&other)), "write a list of tables".into());
                Vec::new()
            }
        };
        let mut tables = Vec::with_capacity(list.len());
        for (i, item) in list.into_iter().enumerate() {
            let path = format!("{}[{i}]", self.at(key));
            match item {
                Value::Object(map) => {
                    tables.push(Fields { path, map, known: Vec::new(), gathered: Rc::clone(&self.gathered) });
                }
                other => self.mistake(&format!("{key}[{i}]"), format!("is {}", kind(&other)), "write a table".into()),
            }
        }
        tables
    }

    /// Whether `key` is present and has not been taken yet.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The same, and is not null.
    pub fn has_value(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    /// Records a mistake at `key` of this table.
    pub fn mistake(&self, key: &str, problem: String, fix: String) {
        self.gathered.borrow_mut().mistakes.push(Mistake { at: self.at(key), problem, fix });
    }

    /// What nobody took: the unknown fields of a record, kept as they are.
    pub fn rest(self) -> Map<String, Value> {
        self.map
    }

    /// Every key that nobody took is a mistake (settings: a misspelt key must
    /// not be silently ignored).
    pub fn refuse_rest(&self) {
        for key in self.map.keys() {
            let fix = match nearest(key, &self.known) {
                Some(near) => format!("did you mean \"{near}\"?"),
                None => format!("known here: {}", self.known.join(", ")),
            };
            self.mistake(key, "is not a known key".into(), fix);
        }
    }

    /// All mistakes so far, of this table and all that came from the same root.
    pub fn mistakes(&self) -> Vec<Mistake> {
        self.gathered.borrow().mistakes.clone()
    }

    fn at(&self, key: &str) -> String {
        match (self.path.is_empty(), key.starts_with('[')) {
            (true, _) => key.to_owned(),
            (false, true) => format!("{}{key}", self.path),
            (false, false) => format!("{}.{key}", self.path),
        }
    }
}

/// The kind of a value in words, for messages.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a table",
    }
}

/// The known key that a misspelt one most likely meant.
fn nearest<'a>(key: &str, known: &'a [String]) -> Option<&'a str> {
    known
        .iter()
        .map(|k| (edit_distance(key, k), k.as_str()))
        .min()
        .filter(|(distance, k)| *distance <= 1 + k.len() / 4)
        .map(|(_, k)| k)
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut left = i + 1;
        let mut diagonal = i;
        for (cb, cell) in b.iter().zip(row.iter_mut().skip(1)) {
            let here = (diagonal + usize::from(ca != *cb)).min(left + 1).min(*cell + 1);
            diagonal = *cell;
            *cell = here;
            left = here;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(a.len())
}

impl Field for bool {
    const EXPECTED: &'static str = "true or false";
    fn from_value(value: &Value) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| format!("is {}", kind(value)))
    }
}

impl Field for String {
    const EXPECTED: &'static str = "a string";
    fn from_value(value: &Value) -> Result<Self, String> {
        value.as_str().map(str::to_owned).ok_or_else(|| format!("is {}", kind(value)))
    }
}

impl Field for PathBuf {
    const EXPECTED: &'static str = "a path";
    fn from_value(value: &Value) -> Result<Self, String> {
        String::from_value(value).map(PathBuf::from)
    }
}

macro_rules! integer_field {
    ($($t:ty => $expected:literal),*) => {$(
        impl Field for $t {
            const EXPECTED: &'static str = $expected;
            fn from_value(value: &Value) -> Result<Self, String> {
                let n = value.as_i64().ok_or_else(|| format!("is {}", if value.is_number() { "not a whole number" } else { kind(value) }))?;
                <$t>::try_from(n).map_err(|_| format!("{n} is out of range"))
            }
        }
    )*};
}
integer_field!(
    u8 => "a whole number from 0 to 255",
    u16 => "a whole number from 0 to 65535",
    u32 => "a whole number from 0 to 4294967295",
    u64 => "a whole number, not negative",
    usize => "a whole number, not negative"
);

impl Field for Duration {
    const EXPECTED: &'static str = "a duration like \"500ms\", \"10s\", \"5m\" or \"2h\"";
    fn from_value(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| format!("is {} without a unit", kind(value)))?;
        let bad = || format!("\"{text}\" is not a duration");
        let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (digits, unit) = text.split_at(split);
        let n: u64 = digits.parse().map_err(|_| bad())?;
        let scale_ms = match unit.trim() {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(bad()),
        };
        n.checked_mul(scale_ms).map(Duration::from_millis).ok_or_else(bad)
    }
}

/// A size in bytes, written with a unit: `"64KiB"`, `"2MiB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub usize);

impl Field for Bytes {
    const EXPECTED: &'static str = "a size like \"16KiB\", \"2MiB\" or \"1GiB\"";
    fn from_value(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| format!("is {} without a unit", kind(value)))?;
        let bad = || format!("\"{text}\" is not a size");
        let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (digits, unit) = text.split_at(split);
        let n: usize = digits.parse().map_err(|_| bad())?;
        let scale = match unit.trim() {
            "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(bad()),
        };
        n.checked_mul(scale).map(Bytes).ok_or_else(bad)
    }
}

/// Bytes written in base64 with padding (RFC 4648 §4). They may be secret: no
/// message and no `Debug` shows them.
#[derive(Clone, PartialEq, Eq)]
pub struct Base64(pub Vec<u8>);

impl fmt::Debug for Base64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for Base64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::BASE64.encode(&self.0))
    }
}

impl Field for Base64 {
    const EXPECTED: &'static str = "base64 with padding, without line breaks";
    fn from_value(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| format!("is {}", kind(value)))?;
        data_encoding::BASE64.decode(text.as_bytes()).map(Self).map_err(|_| "is not base64".to_owned())
    }
}

impl Field for SocketAddr {
    const EXPECTED: &'static str = "an address with a port like \"0.0.0.0:443\" or \"[::]:443\"";
    fn from_value(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| format!("is {}", kind(value)))?;
        text.parse().map_err(|_| format!("\"{text}\" is not an address with a port"))
    }
}

impl Field for IpAddr {
    const EXPECTED: &'static str = "an address without a port like \"0.0.0.0\" or \"::\"";
    fn from_value(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| format!("is {}", kind(value)))?;
        text.parse().map_err(|_| format!("\"{text}\" is not an address without a port"))
    }
}

/// The addresses of a network: `"10.0.0.0/8"`, or one address alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network(pub IpNet);

impl Network {
    /// Whether `ip` is one of them; IPv4-mapped IPv6 addresses are IPv4.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.0.contains(&ip.to_canonical())
    }
}

/// IPv4-mapped addresses are written as the IPv4 addresses they are, since that is
/// what they are compared with.
fn unmapped(network: IpNet) -> IpNet {
    match (network.addr().to_canonical(), network.prefix_len().checked_sub(96)) {
        (ip @ IpAddr::V4(_), Some(len)) if matches!(network, IpNet::V6(_)) => IpNet::new(ip, len).unwrap_or(network),
        _ => network,
    }
}

impl Field for Network {
    const EXPECTED: &'static str = "a network like \"10.0.0.0/8\" or \"fd00::/8\", or an address";
    fn from_value(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| format!("is {}", kind(value)))?;
        let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network.map(unmapped).map(Self).map_err(|_| format!("\"{}\" is not a network", text.escape_debug()))
    }
}

/// Ports from the first to the last, both included: `"20000-20999"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest port.
    pub first: u16,
    /// The highest port.
    pub last: u16,
}

impl PortRange {
    /// Whether `port` is one of them.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// The ports in rising order.
    pub fn iter(self) -> impl Iterator<Item = u16> {
        self.first..=self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl Field for PortRange {
    const EXPECTED: &'static str = "a range of ports like \"20000-20999\"";
    fn from_value(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| format!("is {}", kind(value)))?;
        let port = |t: &str| t.trim().parse::<u16>().ok().filter(|p| *p > 0);
        match text.split_once('-').map(|(a, b)| (port(a), port(b))) {
            Some((Some(first), Some(last))) if first <= last => Ok(Self { first, last }),
            _ => Err(format!("\"{}\" is not a range of ports", text.escape_debug())),
        }
    }
}

/// Any JSON value, as it is.
impl Field for Value {
    const EXPECTED: &'static str = "any value";
    fn from_value(value: &Value) -> Result<Self, String> {
        Ok(value.clone())
    }
}

impl<T: Field> Field for Vec<T> {
    const EXPECTED: &'static str = "a list";
    fn from_value(value: &Value) -> Result<Self, String> {
        let list = value.as_array().ok_or_else(|| format!("is {}, not a list", kind(value)))?;
        list.iter()
            .enumerate()
            .map(|(i, item)| T::from_value(item).map_err(|e| format!("item {i} {e} (each: {})", T::EXPECTED)))
            .collect()
    }
}

/// A field whose text form is checked by its type's `FromStr`.
#[macro_export]
macro_rules! text_field {
    ($t:ty, $expected:literal) => {
        impl $crate::fields::Field for $t {
            const EXPECTED: &'static str = $expected;
            fn from_value(value: &serde_json::Value) -> Result<Self, String> {
                let text = value.as_str().ok_or_else(|| "is not a string".to_owned())?;
                text.parse().map_err(|e| format!("\"{}\" {e}", text.escape_debug()))
            }
        }
    };
}
