//! Names of the files beside a destination. SPEC 3.1.

/// What the temporary name of an unfinished destination ends with.
pub const PART_ENDING: &str = ".bitferry-part";
/// What the name of its journal ends with.
pub const JOURNAL_ENDING: &str = ".bitferry-journal";
/// What the name of the receipt of a finished destination ends with.
pub const RECEIPT_ENDING: &str = ".bitferry-receipt";
/// What a journal that is written anew ends with until it takes the old one's place.
pub const JOURNAL_ANEW_ENDING: &str = ".bitferry-journal.new";
/// What a receipt ends with until it is whole.
pub const RECEIPT_HALF_ENDING: &str = ".bitferry-receipt.new";
/// Longest file name in bytes that file systems take.
const MAX_NAME_BYTES: usize = 255;
/// Bytes of an overlong name that are kept.
const KEPT_BYTES: usize = 200;
/// Hexadecimal digits of the hash that stands for the rest.
const HASH_DIGITS: usize = 16;

/// The temporary name, in the same directory, of a destination whose file name is `name`.
pub fn temporary_name(name: &[u8]) -> Vec<u8> {
    beside(name, PART_ENDING)
}

/// The name of its journal.
pub fn journal_name(name: &[u8]) -> Vec<u8> {
    beside(name, JOURNAL_ENDING)
}

/// The name of its receipt.
pub fn receipt_name(name: &[u8]) -> Vec<u8> {
    beside(name, RECEIPT_ENDING)
}

/// The name of a journal that is written anew, until it takes the old one's place.
pub fn journal_anew_name(name: &[u8]) -> Vec<u8> {
    beside(name, JOURNAL_ANEW_ENDING)
}

/// The name of a receipt until it is whole.
pub fn receipt_half_name(name: &[u8]) -> Vec<u8> {
    beside(name, RECEIPT_HALF_ENDING)
}

/// Whether a file name is one that stands beside a destination, whatever that is called: no
/// destination has such a name.
pub fn is_reserved(name: &[u8]) -> bool {
    let endings =
        [PART_ENDING, JOURNAL_ENDING, RECEIPT_ENDING, JOURNAL_ANEW_ENDING, RECEIPT_HALF_ENDING];
    name.starts_with(b".") && endings.iter().any(|ending| name.ends_with(ending.as_bytes()))
}

fn beside(name: &[u8], ending: &str) -> Vec<u8> {
    let whole = [b".", name, ending.as_bytes()].concat();
    if whole.len() <= MAX_NAME_BYTES {
        return whole;
    }
    let hash = blake3::hash(name).to_hex();
    let digits = hash.as_bytes().get(..HASH_DIGITS).unwrap_or_default();
    [b".", cut(name), digits, ending.as_bytes()].concat()
}

/// The first [`KEPT_BYTES`] of a name, or up to three fewer so as not to cut a UTF-8 character.
fn cut(name: &[u8]) -> &[u8] {
    let is_inside = |at: usize| name.get(at).is_some_and(|b| b & 0xc0 == 0x80);
    let back = (0..4).find(|back| !is_inside(KEPT_BYTES.saturating_sub(*back))).unwrap_or(0);
    name.get(..KEPT_BYTES.saturating_sub(back)).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_kept() {
        assert_eq!(temporary_name(b"vm.qcow2"), b".vm.qcow2.bitferry-part");
        assert_eq!(temporary_name(&[b'x'; 240]).len(), 255);
        assert_eq!(journal_name(b"vm"), b".vm.bitferry-journal");
        assert_eq!(receipt_name(b"vm"), b".vm.bitferry-receipt");
    }

    #[test]
    fn no_name_is_too_long() {
        for len in 1..=255 {
            let name = vec![b'x'; len];
            let names = [temporary_name, journal_name, receipt_name]
                .into_iter()
                .chain([journal_anew_name, receipt_half_name])
                .map(|beside| beside(&name));
            let names: std::collections::BTreeSet<_> = names.collect();
            assert!(names.len() == 5 && names.iter().all(|name| name.len() <= 255), "{len}");
        }
    }

    #[test]
    fn long_names_are_cut_at_a_character_and_stay_apart() {
        let long = "ä".repeat(125);
        let other = format!("{long}b");
        let names = [temporary_name(long.as_bytes()), temporary_name(other.as_bytes())];
        assert_ne!(names[0], names[1]);
        for name in names {
            assert!(name.len() <= MAX_NAME_BYTES);
            assert!(String::from_utf8(name).is_ok());
        }
        let odd = format!("x{}", "ä".repeat(125));
        assert!(String::from_utf8(temporary_name(odd.as_bytes())).is_ok());
        assert!(temporary_name(&[0x80; 255]).len() <= MAX_NAME_BYTES);
    }
}
