//! `[fleet]`: how the nodes of a fleet reach each other.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use crate::fields::{Fields, Network};
use crate::text_field;

/// How the nodes of a fleet reach each other.
#[derive(Debug, Clone, PartialEq)]
pub struct FleetSettings {
    /// Where other nodes arrive. None: this node takes no other's visitors.
    pub listen: Vec<SocketAddr>,
    /// Where they are told to arrive, the best one first; the same, if absent.
    pub advertise: Vec<SocketAddr>,
    /// Networks on which nodes speak plain TCP, which the kernel can splice: a
    /// WireGuard, a fibre of one's own. Whoever is in them is believed to be a node.
    pub private: Vec<Network>,
    /// The fleet's CA (PEM file; several while one follows another).
    pub ca: Option<PathBuf>,
    /// This node's certificate (PEM file): for `node.name`.
    pub certificate: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// Where the node is, for as long as nothing is measured.
    pub place: Option<Coordinates>,
    /// Streams of other nodes' visitors at once. 50000.
    pub streams: usize,
    /// Connections that wait ready for each other node, at most. 32.
    pub warm: usize,
    /// Above this share of the processors' time, in percent, other nodes' visitors go
    /// elsewhere if they can: the more of them, the nearer it is to 100. 85; 100: never.
    pub spare_from: usize,
}

impl Default for FleetSettings {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            advertise: Vec::new(),
            private: Vec::new(),
            ca: None,
            certificate: None,
            key: None,
            place: None,
            streams: 50_000,
            warm: 32,
            spare_from: 85,
        }
    }
}

impl FleetSettings {
    /// Reads the section `fleet` of the settings.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let settings = Self {
            listen: f.take("listen", d.listen),
            advertise: f.take("advertise", d.advertise),
            private: f.take("private", d.private),
            ca: f.optional("ca"),
            certificate: f.optional("certificate"),
            key: f.optional("key"),
            place: f.optional("place"),
            streams: f.take("streams", d.streams),
            warm: f.take("warm", d.warm),
            spare_from: f.take("spare_from", d.spare_from),
        };
        let files = [("ca", &settings.ca), ("certificate", &settings.certificate), ("key", &settings.key)];
        if files.iter().any(|(_, file)| file.is_some()) {
            for (name, _) in files.iter().filter(|(_, file)| file.is_none()) {
                f.mistake(name, "is missing".into(), "write ca, certificate and key (adit ca makes them)".into());
            }
        } else if !settings.listen.is_empty() && settings.private.is_empty() {
            let fix = "write ca, certificate and key (adit ca makes them), or private networks";
            f.mistake("listen", "nobody could come".into(), fix.into());
        }
        if settings.listen.iter().any(|addr| addr.ip().is_unspecified()) && settings.advertise.is_empty() {
            f.mistake("advertise", "is missing beside a wildcard address".into(), "write the node's address".into());
        }
        if settings.listen.is_empty() && !settings.advertise.is_empty() {
            f.mistake("listen", "is missing".into(), "write where other nodes arrive".into());
        }
        if settings.spare_from > 100 {
            f.mistake("spare_from", "is no share".into(), "write a whole number from 0 to 100".into());
        }
        if settings.streams == 0 {
            f.mistake("streams", "0 would refuse everybody".into(), "write a whole number from 1".into());
        }
        settings
    }

    /// Whether nodes speak plain TCP with who is there.
    pub(super) fn is_private(&self, ip: IpAddr) -> bool {
        self.private.iter().any(|network| network.contains(ip))
    }
}

/// A place on the globe, in degrees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Coordinates {
    /// North.
    pub latitude: f64,
    /// East.
    pub longitude: f64,
}

impl Coordinates {
    /// The way to another place over the ground, in kilometres.
    pub fn kilometres(self, to: Self) -> f64 {
        let radians = |degrees: f64| degrees.to_radians();
        let (one, other) = (radians(self.latitude), radians(to.latitude));
        let (north, east) = (other - one, radians(to.longitude - self.longitude));
        let half = (north / 2.0).sin().powi(2) + one.cos() * other.cos() * (east / 2.0).sin().powi(2);
        6371.0 * 2.0 * half.sqrt().min(1.0).asin()
    }
}

impl FromStr for Coordinates {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = "is not \"LATITUDE, LONGITUDE\"";
        let (latitude, longitude) = text.split_once(',').ok_or(bad)?;
        let degrees =
            |text: &str, most: f64| text.trim().parse::<f64>().ok().filter(|degrees| degrees.abs() <= most).ok_or(bad);
        Ok(Self { latitude: degrees(latitude, 90.0)?, longitude: degrees(longitude, 180.0)? })
    }
}

impl std::fmt::Display for Coordinates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {}", self.latitude, self.longitude)
    }
}
text_field!(Coordinates, "degrees north and east like \"52.37, 4.90\"");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_over_the_ground() {
        let at = |text: &str| text.parse::<Coordinates>().unwrap();
        let (amsterdam, sydney) = (at("52.37, 4.90"), at("-33.87,151.21"));
        assert!((amsterdam.kilometres(sydney) - 16_640.0).abs() < 50.0);
        assert!(amsterdam.kilometres(amsterdam).abs() < 0.001);
        for bad in ["", "52", "91,0", "0,181", "north, east", "NaN,0"] {
            assert!(bad.parse::<Coordinates>().is_err(), "{bad}");
        }
    }
}
