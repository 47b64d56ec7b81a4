//! Finds the end of a device's state, which no length announces. SPEC 7.4.
//!
//! The footer is looked for: its mark, the section's own id, and after it something that can be the
//! next element. State that holds just such bytes is cut wrongly; the element after it then fails
//! to decode, or names a device that is not there, but nothing else comes of it.

use super::container::{COMMAND, END, EOF, FOOTER, FULL, PART, START, VMDESCRIPTION};
use crate::Reader;

/// Bytes of a footer.
const FOOTER_BYTES: usize = 5;

/// Where a device's state ends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// So many bytes are state for sure, and more may follow.
    State(usize),
    /// The footer stands right here.
    Footer,
    /// At least so many bytes must be seen to tell.
    Need(usize),
}

/// What else is known.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    /// The section's id.
    pub(super) id: u32,
    /// Whether nothing comes after the input: the stream ends there, or the package.
    pub(super) is_whole: bool,
    /// Whether the stream may end after this section; a package does not hold its end.
    pub(super) in_package: bool,
    /// Whether a live section has this id.
    pub(super) is_live: &'a dyn Fn(u32) -> bool,
}

/// Looks at what has arrived of a device's state.
pub(super) fn scan(input: &[u8], context: Context<'_>) -> Scan {
    let Some(at) = input.iter().position(|byte| *byte == FOOTER) else {
        return if input.is_empty() { Scan::Need(1) } else { Scan::State(input.len()) };
    };
    if at > 0 {
        return Scan::State(at);
    }
    let id = context.id.to_be_bytes();
    let seen = input.get(1..FOOTER_BYTES.min(input.len())).unwrap_or_default();
    if !id.starts_with(seen) || (seen.len() < id.len() && context.is_whole) {
        return Scan::State(1);
    }
    if seen.len() < id.len() {
        return Scan::Need(FOOTER_BYTES);
    }
    let after = input.get(FOOTER_BYTES..).unwrap_or_default();
    match may_follow(after, context) {
        Some(true) => Scan::Footer,
        None if !context.is_whole => Scan::Need(input.len().saturating_add(1)),
        _ => Scan::State(1),
    }
}

/// Whether `after` can be what comes after a section; `None` where too little of it is there.
fn may_follow(after: &[u8], context: Context<'_>) -> Option<bool> {
    let mut reader = Reader::new(after, 0);
    if after.is_empty() {
        return if context.is_whole { Some(context.in_package) } else { None };
    }
    let kind = reader.u8("").ok()?;
    Some(match kind {
        // Zeroes are common in state, so that the end of the stream must show more than a zero.
        EOF if reader.left() == 0 && context.is_whole => !context.in_package,
        EOF => {
            let is_description = reader.u8("").ok()? == VMDESCRIPTION && !context.in_package;
            is_description && {
                reader.be32("").ok()?;
                reader.u8("").ok()? == b'{'
            }
        }
        START | FULL => {
            reader.be32("").ok()?;
            let len = reader.u8("").ok()?;
            let available = reader.left().min(len.into());
            let name = reader.take(available, "").ok()?;
            let is_name = len > 0 && name.iter().all(u8::is_ascii_graphic);
            is_name && (name.len() == usize::from(len)).then_some(true)?
        }
        PART | END => (context.is_live)(reader.be32("").ok()?),
        COMMAND => (1..=11).contains(&reader.be16("").ok()?),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(input: &[u8], is_whole: bool, in_package: bool) -> Scan {
        let is_live = |id| id == 2;
        scan(input, Context { id: 5, is_whole, in_package, is_live: &is_live })
    }

    #[test]
    fn a_footer_needs_what_may_follow_it() {
        let footer = b"\x7e\0\0\0\x05";
        let with = |after: &[u8]| [&footer[..], after].concat();
        for after in [
            &b"\x04\0\0\0\x09\x03abc"[..],
            b"\x03\0\0\0\x02",
            b"\x02\0\0\0\x02",
            b"\x08\0\x0b",
            b"\0\x06\0\0\x01\0{",
        ] {
            assert_eq!(look(&with(after), false, false), Scan::Footer, "{after:x?}");
            for cut in 0..after.len() {
                let seen = look(&with(&after[..cut]), false, false);
                assert_eq!(seen, Scan::Need(6 + cut), "{after:x?} cut at {cut}");
            }
        }
        for after in [
            &b"\x04\0\0\0\x09\0"[..],
            b"\x04\0\0\0\x09\x03a\0",
            b"\x03\0\0\0\x07",
            b"\x08\0\0",
            b"\x08\0\x0c",
            b"\0\0",
            b"\0\x06\0\0\x01\0x",
            b"\x07",
            b"\x7e",
        ] {
            assert_eq!(look(&with(after), false, false), Scan::State(1), "{after:x?}");
        }
    }

    #[test]
    fn the_end_of_the_input_counts_only_where_it_is_the_end() {
        assert_eq!(look(b"\x7e\0\0\0\x05\0", true, false), Scan::Footer);
        assert_eq!(look(b"\x7e\0\0\0\x05\0", false, false), Scan::Need(7));
        assert_eq!(look(b"\x7e\0\0\0\x05", true, true), Scan::Footer);
        assert_eq!(look(b"\x7e\0\0\0\x05", true, false), Scan::State(1));
        assert_eq!(look(b"\x7e\0\0\0\x05\0", true, true), Scan::State(1));
        assert_eq!(look(b"\x7e\0\0", true, false), Scan::State(1));
        assert_eq!(look(b"\x7e\0\0", false, false), Scan::Need(5));
        assert_eq!(look(b"abc\x7e\0", false, false), Scan::State(3));
        assert_eq!(look(b"\x7e\0\x01", false, false), Scan::State(1));
        assert_eq!(look(b"", false, false), Scan::Need(1));
    }
}
