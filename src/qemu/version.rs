//! What a QEMU of a given version takes. Pure.

use std::str::FromStr;

use crate::{Error, Result};

/// The version that a peer's stream follows: the older of its QEMU and its machine type, since a
/// newer QEMU with an old machine type speaks as the old one did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// The number before the point.
    pub major: u16,
    /// The number behind it.
    pub minor: u16,
}

impl Version {
    /// The oldest that is known here.
    pub const OLDEST: Self = Self::new(7, 2);
    /// The newest that was tested; what is newer is treated as this one.
    pub const NEWEST: Self = Self::new(10, 0);

    /// A version by its numbers.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self { major, minor }
    }

    /// The version at the end of a machine type's name: `pc-q35-9.2`. `None` where there is none,
    /// as in `none`, `q35` and the machine types of distributions.
    pub fn of_machine(name: &str) -> Option<Self> {
        let (_, end) = name.rsplit_once('-')?;
        parse(end)
    }

    /// The version to follow, by what the user says of the peer: the older of both, and the newest
    /// known where nothing is said.
    pub fn decide(dialect: Option<Self>, machine: &str) -> Result<Self> {
        let said = dialect.into_iter().chain(Self::of_machine(machine)).min();
        let version = said.unwrap_or(Self::NEWEST);
        if version < Self::OLDEST {
            let reason =
                format!("QEMU {version} is older than {}, the oldest known here", Self::OLDEST);
            return Err(Error::Usage { reason });
        }
        Ok(version)
    }

    /// Whether it has the `block` section. QEMU 9.1 dropped it.
    pub fn has_block_section(self) -> bool {
        self < Self::new(9, 1)
    }

    /// Whether it takes pages that are compressed one by one. QEMU 9.1 dropped them.
    pub fn has_compressed_pages(self) -> bool {
        self < Self::new(9, 1)
    }

    /// Whether it knows the flag MULTIFD_FLUSH of the `ram` section, and syncs multifd channels
    /// there. Older ones sync at each end of a section and die on the flag.
    pub fn has_multifd_flush(self) -> bool {
        self >= Self::new(8, 1)
    }

    /// Whether it answers SWITCHOVER_ACK on the return path.
    pub fn has_switchover_ack(self) -> bool {
        self >= Self::new(8, 1)
    }

    /// Whether its multifd packets may list zero pages. Older ones ignore such a list.
    pub fn has_multifd_zero_pages(self) -> bool {
        self >= Self::new(9, 0)
    }

    /// Whether it knows the capability `mapped-ram`.
    pub fn has_mapped_ram(self) -> bool {
        self >= Self::new(9, 0)
    }

    /// Whether it takes the command SWITCHOVER_START. Older ones die of it.
    pub fn has_switchover_start(self) -> bool {
        self >= Self::new(10, 0)
    }

    /// Refuses to send disk contents to a peer that has no section for them.
    pub fn require_block_section(self) -> Result<()> {
        if self.has_block_section() {
            return Ok(());
        }
        let reason = format!(
            "QEMU {self} takes no disk contents in its migration stream (9.0 was the last): send \
             bitmaps alone with --no-blocks and move the contents by copy, mirror or NBD; for an \
             older peer say --dialect qemu:VERSION"
        );
        Err(Error::Usage { reason })
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Version {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        parse(text).ok_or_else(|| Error::Usage {
            reason: format!("{text:?} is not a version of QEMU, such as 7.2 or 10.0"),
        })
    }
}

fn parse(text: &str) -> Option<Version> {
    let (major, minor) = text.split_once('.')?;
    let number = |digits: &str| {
        let is_plain = digits.bytes().all(|b| b.is_ascii_digit());
        is_plain.then(|| digits.parse().ok()).flatten()
    };
    Some(Version::new(number(major)?, number(minor)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_types_tell_their_version() {
        for (name, version) in [
            ("pc-i440fx-7.2", Some(Version::new(7, 2))),
            ("pc-q35-10.0", Some(Version::new(10, 0))),
            ("virt-9.1", Some(Version::new(9, 1))),
            ("none", None),
            ("pc", None),
            ("", None),
            ("pc-q35-rhel9.4.0", None),
            ("pc-q35-+9.1", None),
            ("x-9.", None),
            ("x-99999.1", None),
        ] {
            assert_eq!(Version::of_machine(name), version, "{name}");
        }
    }

    #[test]
    fn the_older_one_counts() {
        let decide = |dialect: Option<&str>, machine| {
            Version::decide(dialect.map(|d| d.parse().unwrap()), machine)
        };
        assert_eq!(decide(None, "").unwrap(), Version::NEWEST);
        assert_eq!(decide(None, "pc-q35-8.2").unwrap(), Version::new(8, 2));
        assert_eq!(decide(Some("9.0"), "pc-q35-8.2").unwrap(), Version::new(8, 2));
        assert_eq!(decide(Some("7.2"), "pc-q35-8.2").unwrap(), Version::new(7, 2));
        assert!(matches!(decide(Some("7.1"), ""), Err(Error::Usage { .. })));
        for bad in ["", "7", "7.x", "7.2.22", "-7.2", "qemu"] {
            assert!(bad.parse::<Version>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_came_and_went() {
        let table = |v: Version| {
            [
                v.has_block_section(),
                v.has_compressed_pages(),
                v.has_multifd_flush(),
                v.has_switchover_ack(),
                v.has_multifd_zero_pages(),
                v.has_mapped_ram(),
                v.has_switchover_start(),
            ]
            .map(u8::from)
        };
        for (version, row) in [
            ((7, 2), [1, 1, 0, 0, 0, 0, 0]),
            ((8, 0), [1, 1, 0, 0, 0, 0, 0]),
            ((8, 1), [1, 1, 1, 1, 0, 0, 0]),
            ((8, 2), [1, 1, 1, 1, 0, 0, 0]),
            ((9, 0), [1, 1, 1, 1, 1, 1, 0]),
            ((9, 1), [0, 0, 1, 1, 1, 1, 0]),
            ((9, 2), [0, 0, 1, 1, 1, 1, 0]),
            ((10, 0), [0, 0, 1, 1, 1, 1, 1]),
            ((10, 1), [0, 0, 1, 1, 1, 1, 1]),
        ] {
            let version = Version::new(version.0, version.1);
            assert_eq!(table(version), row, "{version}");
            assert_eq!(version.require_block_section().is_ok(), row[0] == 1);
        }
    }
}
