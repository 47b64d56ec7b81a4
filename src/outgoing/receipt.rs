//! What a destination says of a session that it had finished, held against what this side has.

use std::collections::BTreeMap;

use block_mig::arrive::MAX_DISKS;
use format_spec::content_hash::{BitmapDigest, ContentHash};
use format_spec::native::answer::{Answer, Published, PublishedBitmap};
use mig_core::heart::within;
use mig_core::stream::{Breaker, Buffers, Error, Result, StreamReader};
use mig_core::transport::HangUp;

use super::OutgoingOptions;

/// What this side knows of a disk that it may have sent before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedDisk {
    /// Its name on the wire.
    pub name: String,
    /// Guest-visible bytes.
    pub size: u64,
    /// What the destination proved to have of it, in an attempt of this process.
    pub content: Option<ContentHash>,
    /// Its bitmaps by their names on the wire; `None` where they may have changed since.
    pub bitmaps: Option<Vec<(String, BitmapDigest)>>,
}

/// Hears what was published, to the word that it was, in bounded time.
pub(super) fn hear(
    mut reader: StreamReader,
    breaker: &Breaker,
    options: &OutgoingOptions<'_>,
) -> Result<Vec<Published>> {
    let buffers = Buffers::new(1);
    let mut published = Vec::new();
    within(options.timing.hello, &All(breaker), || {
        loop {
            let arrival = reader.record(&buffers)?;
            match Answer::decode(&arrival.record()).map_err(|e| arrival.malformed(e))? {
                None | Some(Answer::Keepalive) => {}
                Some(Answer::Published(disk)) if published.len() < MAX_DISKS => {
                    published.push(disk);
                }
                Some(Answer::Committed(session)) if session == options.session => {
                    return Ok(std::mem::take(&mut published));
                }
                Some(Answer::Failed { blame, text, .. }) => {
                    return Err(Error::Peer { blame, text });
                }
                Some(_) => {
                    return Err(arrival.protocol("it answers what was not asked"));
                }
            }
        }
    })
}

/// All connections, as one line.
struct All<'a>(&'a Breaker);

impl HangUp for All<'_> {
    fn hang_up(&self) {
        self.0.hang_up();
    }
}

/// Fails where something else was published than this side has. Who expects nothing believes it.
pub(super) fn hold(expected: &[ExpectedDisk], published: &[Published]) -> Result<()> {
    if expected.is_empty() {
        return Ok(());
    }
    let wrong = |what: String| {
        let reason = format!("it says that this was finished before, and {what}");
        Err(Error::Mismatch { reason })
    };
    if expected.len() != published.len() {
        let (ours, theirs) = (expected.len(), published.len());
        return wrong(format!("has published {theirs} disks instead of {ours}"));
    }
    for disk in expected {
        let Some(found) = published.iter().find(|found| found.name == disk.name) else {
            return wrong(format!("has published no disk {:?}", disk.name));
        };
        if let Some(difference) = difference(disk, found) {
            return wrong(format!("disk {:?} {difference}", disk.name));
        }
    }
    Ok(())
}

fn difference(disk: &ExpectedDisk, found: &Published) -> Option<String> {
    if disk.size != found.size {
        return Some(format!("has {} bytes there and {} here", found.size, disk.size));
    }
    if let (Some(sent), Some(published)) = (disk.content, found.content)
        && sent != published
    {
        return Some(format!("was sent as {sent} and published as {published}"));
    }
    let bitmaps = disk.bitmaps.as_ref()?;
    let mut left: BTreeMap<&str, BitmapDigest> =
        bitmaps.iter().map(|(name, digest)| (name.as_str(), *digest)).collect();
    for PublishedBitmap { name, sent_as, digest } in &found.bitmaps {
        // A name that another bitmap was renamed to may be one that was sent, too.
        let ours = [sent_as, name].into_iter().find(|name| left.get(name.as_str()) == Some(digest));
        if ours.is_none_or(|ours| left.remove(ours.as_str()).is_none()) {
            let ours = [sent_as, name].into_iter().find_map(|name| left.get(name.as_str()));
            return Some(match ours {
                Some(ours) => format!("has bitmap {name:?} as {digest} there and as {ours} here"),
                None => format!("has a bitmap {name:?} there that was not sent"),
            });
        }
    }
    left.keys().next().map(|name| format!("lacks bitmap {name:?} there"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: ContentHash = ContentHash([1; 32]);

    fn digest(seed: u8) -> BitmapDigest {
        BitmapDigest([seed; 32])
    }

    fn expected() -> ExpectedDisk {
        let bitmaps = vec![("a".to_owned(), digest(1)), ("b".to_owned(), digest(2))];
        ExpectedDisk {
            name: "vda".to_owned(),
            size: 512,
            content: Some(ROOT),
            bitmaps: Some(bitmaps),
        }
    }

    fn published() -> Published {
        let bitmap = |name: &str, sent_as: &str, seed| PublishedBitmap {
            name: name.to_owned(),
            sent_as: sent_as.to_owned(),
            digest: digest(seed),
        };
        let bitmaps = vec![bitmap("b", "b", 2), bitmap("new", "a", 1)];
        let (name, content) = ("vda".to_owned(), Some(ROOT));
        let (is_unchanged, is_bitmaps_alone) = (true, false);
        Published { name, size: 512, content, is_unchanged, is_bitmaps_alone, bitmaps }
    }

    type Change = fn(&mut Published);

    #[test]
    fn what_was_published_is_what_is_here_or_an_error() {
        hold(&[expected()], &[published()]).unwrap();
        hold(&[], &[published()]).unwrap();
        let changes: [(&str, Change); 7] = [
            ("no disk", |p| p.name.push('x')),
            ("1024 bytes", |p| p.size = 1024),
            ("published as", |p| p.content = Some(ContentHash([2; 32]))),
            ("\"b\" as", |p| p.bitmaps[0].digest = digest(9)),
            ("was not sent", |p| p.bitmaps[0] = p.bitmaps[1].clone()),
            ("lacks bitmap \"a\"", |p| drop(p.bitmaps.pop())),
            ("was not sent", |p| p.bitmaps[1].sent_as = "c".to_owned()),
        ];
        for (words, change) in changes {
            let mut other = published();
            change(&mut other);
            let error = hold(&[expected()], &[other]).unwrap_err().to_string();
            assert!(error.contains(words), "{error}: {words}");
        }
        assert!(hold(&[expected()], &[]).unwrap_err().to_string().contains("0 disks"));
        // What is not known here is not held against anything.
        let vague = ExpectedDisk { content: None, bitmaps: None, ..expected() };
        let mut other = published();
        (other.content, other.bitmaps) = (Some(ContentHash([2; 32])), Vec::new());
        hold(&[vague], &[other]).unwrap();
        hold(&[expected()], &[Published { content: None, ..published() }]).unwrap();
        // "a" is stored as "b", and another one was "b" before.
        let mut swapped = published();
        swapped.bitmaps[0].sent_as = "z".to_owned();
        hold(&[expected()], &[swapped]).unwrap();
    }
}
