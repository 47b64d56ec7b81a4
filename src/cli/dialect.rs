//! `--dialect` and what only makes sense with QEMU at the other end.

use std::path::PathBuf;

use clap::Args as Group;

use bitferry::qemu::Version;
use bitferry::receive::Dialect;
use bitferry::{Error, Result};

/// What `--dialect` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DialectArg {
    /// bitferry's own.
    Native,
    /// QEMU's, of that version.
    Qemu(Option<Version>),
}

impl std::str::FromStr for DialectArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "native" => Ok(Self::Native),
            None if text == "qemu" => Ok(Self::Qemu(None)),
            Some(("qemu", version)) => {
                let version = version.parse().map_err(|e: Error| e.to_string())?;
                Ok(Self::Qemu(Some(version)))
            }
            _ => Err("it is native, qemu or qemu:VERSION, as in qemu:7.2".to_owned()),
        }
    }
}

impl DialectArg {
    /// Without the version.
    pub(crate) fn dialect(self) -> Dialect {
        match self {
            Self::Native => Dialect::Native,
            Self::Qemu(_) => Dialect::Qemu,
        }
    }

    /// Refuses to receive what a source of that version cannot send. The bytes do not tell that
    /// somebody migrates with `-i`; whether a version can, is known.
    pub(crate) fn check_source(self, shared_base: bool) -> Result<()> {
        let Self::Qemu(Some(version)) = self else { return Ok(()) };
        let version = Version::decide(Some(version), "")?;
        if !shared_base || version.has_block_section() {
            return Ok(());
        }
        let reason = format!(
            "QEMU {version} sends no disk contents (9.0 was the last) and has no `migrate -i`: \
             leave --shared-base out, or --dialect qemu:{version} where it is an older one"
        );
        Err(Error::Usage { reason })
    }
}

/// What only makes sense with QEMU at the other end.
#[derive(Debug, Group)]
pub(crate) struct QemuArgs {
    /// What the destination speaks: native, or qemu:VERSION with the older of its QEMU's version
    /// and its machine type's
    #[arg(long, value_name = "native|qemu[:VERSION]", default_value = "native")]
    #[arg(hide_default_value = true, help_heading = "To a QEMU")]
    pub(crate) dialect: DialectArg,
    /// Machine type of the destination, as its -machine says
    #[arg(long, value_name = "NAME", help_heading = "To a QEMU")]
    pub(crate) machine: Option<String>,
    /// UUID of the machine
    #[arg(long, value_parser = uuid, help_heading = "To a QEMU")]
    pub(crate) uuid: Option<Uuid>,
    /// Carry the disks' contents; the default
    #[arg(long, overrides_with = "no_blocks")]
    pub(crate) blocks: bool,
    /// Carry bitmaps alone, to a destination whose own image has the same contents: a mirror, a
    /// copy. The only way to a QEMU since 9.1; a bitferry has to receive --in-place. An image on
    /// shared storage, or copied with its bitmaps, brings them along: send none
    #[arg(long)]
    pub(crate) no_blocks: bool,
    /// Carry only what is allocated above the backing files, which the destination has its own
    /// copies of: QEMU's `migrate -i`. A bitferry has to `receive --backing`
    #[arg(long, conflicts_with_all = ["flatten", "no_blocks"])]
    pub(crate) shared_base: bool,
    /// Monitor of the destination: refuse beforehand what it would drop or fail of, and confirm
    /// afterwards what it has. Without it nobody sees that the image there holds a bitmap of that
    /// name, with which QEMU loses the disk as soon as it runs
    #[arg(long, value_name = "SOCKET", help_heading = "To a QEMU")]
    pub(crate) peer_qmp: Option<PathBuf>,
}

/// 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Uuid(pub(crate) [u8; 16]);

/// Hexadecimal digits with dashes or without.
fn uuid(text: &str) -> Result<Uuid, String> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let number = u128::from_str_radix(&digits, 16).ok();
    let is_plain = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    let number = number.filter(|_| is_plain).ok_or("it has 32 hexadecimal digits")?;
    Ok(Uuid(number.to_be_bytes()))
}

impl QemuArgs {
    /// Refuses what the native dialect has no use for.
    pub(crate) fn refuse_in_native(&self) -> Result<()> {
        let given = [
            (self.machine.is_some(), "--machine"),
            (self.uuid.is_some(), "--uuid"),
            (self.peer_qmp.is_some(), "--peer-qmp"),
        ];
        match given.iter().find(|(is_given, _)| *is_given) {
            Some((_, option)) => {
                let reason = format!("{option} is for a QEMU at the other end: --dialect qemu");
                Err(Error::Usage { reason })
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dialects_are_understood() {
        let parse = |text: &str| text.parse::<DialectArg>();
        assert_eq!(parse("native"), Ok(DialectArg::Native));
        assert_eq!(parse("qemu"), Ok(DialectArg::Qemu(None)));
        assert_eq!(parse("qemu:7.2"), Ok(DialectArg::Qemu(Some(Version::new(7, 2)))));
        for text in ["", "QEMU", "qemu:", "qemu:x", "native:1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_source_is_asked_for_what_its_version_can_do() {
        let check = |text: &str, shared_base| {
            let dialect: DialectArg = text.parse().unwrap();
            dialect.check_source(shared_base).is_ok()
        };
        assert!(check("native", true) && check("qemu", true) && check("qemu:9.0", true));
        assert!(check("qemu:10.0", false) && check("qemu:99.0", false));
        assert!(!check("qemu:9.1", true) && !check("qemu:7.1", false));
    }

    #[test]
    fn a_uuid_has_32_digits() {
        let uuid = |text| super::uuid(text).map(|u| u.0[0]);
        assert_eq!(uuid("12345678-9abc-def0-1234-56789abcdef0"), Ok(0x12));
        assert_eq!(uuid("123456789abcdef0123456789abcdef0"), Ok(0x12));
        for text in ["", "1234", "+2345678-9abc-def0-1234-56789abcdef0", "x"] {
            assert!(uuid(text).is_err(), "{text}");
        }
    }
}
