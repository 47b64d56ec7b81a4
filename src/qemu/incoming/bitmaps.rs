//! The bitmaps that have arrived so far, and the rules that hold between records (SPEC 7.2). Pure:
//! nothing is stored before the stream has ended well.

use std::collections::BTreeMap;

use format_spec::Blame;
use format_spec::qemu::dirty_bitmap::{Body, ENABLED, PERSISTENT, Record};
use qcow2_file::limits::{MAX_BITMAP_BYTES as MAX_STORED_BYTES, MAX_BITMAP_NAME_BYTES};

use super::super::error::{Error, Result, Subject};
use super::limits::{MAX_BITMAP_BYTES, MAX_BITMAPS, MAX_LISTED};
use super::loading::Loading;
use super::options::IncomingOptions;

/// What a disk of this side can hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Holder {
    /// The disk's name on the wire.
    pub(super) id: String,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Why it can hold no bitmaps, if so.
    pub(super) cannot: Option<String>,
    /// Names of bitmaps that are taken there.
    pub(super) names: BTreeMap<String, Taken>,
}

/// By whom a bitmap's name is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// By a bitmap of the image that may be used.
    Usable,
    /// By a bitmap of the image that may not be used.
    Broken,
    /// By another bitmap of the stream.
    Arriving,
}

/// What becomes of a bitmap of the stream.
#[derive(Debug)]
pub(super) enum Fate {
    /// It is loaded.
    Loaded(Box<Loading>),
    /// It was not asked for.
    Unwanted,
    /// No disk of this side has its disk's name.
    Homeless,
}

/// The bitmaps that have arrived so far.
#[derive(Debug)]
pub(super) struct Bitmaps<'o> {
    options: &'o IncomingOptions,
    holders: Vec<Holder>,
    /// By disk and name, as they are on the wire.
    fates: BTreeMap<String, BTreeMap<String, Fate>>,
    count: usize,
    bytes: u64,
    homeless: usize,
    /// Whether their section came, in which there may be none.
    pub(super) has_section: bool,
}

impl<'o> Bitmaps<'o> {
    /// Nothing has arrived for these disks.
    pub(super) fn new(options: &'o IncomingOptions, holders: Vec<Holder>) -> Self {
        let fates = BTreeMap::new();
        Self { options, holders, fates, count: 0, bytes: 0, homeless: 0, has_section: false }
    }

    /// Takes a record that stands at byte `at` and speaks of `bitmap` of `disk`. `is_untouched`
    /// says that nothing was written to any image yet.
    pub(super) fn record(
        &mut self,
        record: &Record<'_>,
        (disk, bitmap): (&str, &str),
        at: u64,
        is_untouched: bool,
    ) -> Result<()> {
        let named = Named { disk, bitmap, at };
        match record.body {
            Body::None => {}
            Body::Start { granularity, flags } => {
                let blame = if is_untouched { Blame::WouldLose } else { Blame::Device };
                self.start(named, granularity, flags, blame)?;
            }
            Body::Bits { first_sector, sectors, buffer } => {
                if let Some(loading) = self.loading(named, "bits")? {
                    let put = loading.put(first_sector, sectors, buffer);
                    put.map_err(|reason| named.misfit(Blame::Bytes, reason))?;
                }
            }
            Body::Complete => {
                if let Some(loading) = self.loading(named, "COMPLETE")? {
                    let completed = loading.complete();
                    completed.map_err(|reason| named.misfit(Blame::Bytes, reason))?;
                }
            }
        }
        if record.ends_body() { self.end_of_body(at) } else { Ok(()) }
    }

    fn start(&mut self, named: Named<'_>, granularity: u32, flags: u8, blame: Blame) -> Result<()> {
        let Named { disk, bitmap, .. } = named;
        if self.fates.get(disk).is_some_and(|bitmaps| bitmaps.contains_key(bitmap)) {
            return Err(named.misfit(Blame::Bytes, "is started twice".to_owned()));
        }
        if self.count >= MAX_BITMAPS {
            let reason = format!("is one more than the limit of {MAX_BITMAPS} bitmaps");
            return Err(named.misfit(Blame::Bytes, reason));
        }
        let fate = if !self.options.wants(bitmap) {
            Fate::Unwanted
        } else if let Some(index) = self.holders.iter().position(|holder| holder.id == disk) {
            let mut loading = self.new_loading(index, named, granularity, blame)?;
            loading.is_enabled = flags & ENABLED != 0;
            loading.is_persistent = flags & PERSISTENT != 0;
            self.bytes = self.bytes.saturating_add(loading.byte_len());
            Fate::Loaded(Box::new(loading))
        } else {
            self.homeless = self.homeless.saturating_add(1);
            Fate::Homeless
        };
        self.count = self.count.saturating_add(1);
        self.fates.entry(disk.to_owned()).or_default().insert(bitmap.to_owned(), fate);
        Ok(())
    }

    /// Makes a bitmap for the disk at `index`, and room for its bits. One that the image has and
    /// that may be used is never replaced: it may be the only one of its kind.
    fn new_loading(
        &mut self,
        index: usize,
        named: Named<'_>,
        granularity: u32,
        blame: Blame,
    ) -> Result<Loading> {
        let misfit = |reason| Err(named.misfit(blame, reason));
        let name = self.options.new_name(named.disk, named.bitmap);
        let (total, Some(holder)) = (self.bytes, self.holders.get_mut(index)) else {
            return misfit("has no disk".to_owned());
        };
        if name.is_empty() || name.len() > usize::from(MAX_BITMAP_NAME_BYTES) {
            let len = name.len();
            let reason = format!("its new name has {len} bytes, not 1 to {MAX_BITMAP_NAME_BYTES}");
            return Err(named.misfit(Blame::Caller, reason));
        }
        if let Some(why) = &holder.cannot {
            return misfit(why.clone());
        }
        let taken = holder.names.get(name).copied();
        match taken {
            Some(Taken::Usable) => {
                return misfit(format!(
                    "the image has a bitmap {name:?} already, which may be used; remove that one, \
                     or give this one another name with --rename-bitmap {}/{}=NEW",
                    named.disk, named.bitmap
                ));
            }
            Some(Taken::Arriving) => {
                return misfit(format!(
                    "its name {name:?} is that of another bitmap of the stream"
                ));
            }
            Some(Taken::Broken) | None => {}
        }
        let mut loading = Loading::new(name, granularity, holder.size);
        let fits = check_bytes(total, loading.byte_len(), granularity, holder.size);
        fits.map_err(|reason| named.misfit(blame, reason))?;
        holder.names.insert(name.to_owned(), Taken::Arriving);
        loading.replaces = taken == Some(Taken::Broken);
        loading.allocate();
        Ok(loading)
    }

    /// The bitmap that a record is about; `None` where it is not loaded.
    fn loading(&mut self, named: Named<'_>, what: &str) -> Result<Option<&mut Loading>> {
        let bitmaps = self.fates.get_mut(named.disk);
        match bitmaps.and_then(|bitmaps| bitmaps.get_mut(named.bitmap)) {
            None => Err(named.misfit(Blame::Bytes, format!("{what} before START"))),
            Some(Fate::Unwanted | Fate::Homeless) => Ok(None),
            Some(Fate::Loaded(loading)) if loading.is_complete => {
                Err(named.misfit(Blame::Bytes, format!("{what} after COMPLETE")))
            }
            Some(Fate::Loaded(loading)) => Ok(Some(loading)),
        }
    }

    /// The end of a section's body, by when a QEMU has named all that it starts.
    fn end_of_body(&self, at: u64) -> Result<()> {
        if self.homeless == 0 {
            return Ok(());
        }
        let mut homeless = Vec::new();
        for (disk, bitmaps) in &self.fates {
            let these = bitmaps.iter().filter(|(_, fate)| matches!(fate, Fate::Homeless));
            homeless
                .extend(these.take(MAX_LISTED).map(|(name, _)| format!("{name:?} of {disk:?}")));
            if homeless.len() >= MAX_LISTED {
                break;
            }
        }
        let known: Vec<_> = self.holders.iter().map(|h| format!("{:?}", h.id)).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        let (count, listed) = (self.homeless, homeless.join(", "));
        let disk = self.first_homeless().unwrap_or_default().to_owned();
        Err(Error::Misfit {
            subject: Subject { disk, bitmap: None },
            offset: at,
            reason: format!(
                "{count} bitmaps have no place: {listed}; the disks named with --disk are {known}. \
                 Name their images, or leave the bitmaps out with --bitmaps"
            ),
            blame: Blame::WouldLose,
        })
    }

    fn first_homeless(&self) -> Option<&str> {
        let is_homeless = |bitmaps: &BTreeMap<String, Fate>| {
            bitmaps.values().any(|fate| matches!(fate, Fate::Homeless))
        };
        self.fates.iter().find(|(_, b)| is_homeless(b)).map(|(disk, _)| disk.as_str())
    }

    /// Whether any came of a disk, wanted or not.
    pub(super) fn has_any(&self, disk: &str) -> bool {
        self.fates.contains_key(disk)
    }

    /// All that arrived: by disk and name on the wire.
    pub(super) fn into_fates(self) -> BTreeMap<String, BTreeMap<String, Fate>> {
        self.fates
    }
}

/// What a record is about, and where it stands.
#[derive(Clone, Copy)]
struct Named<'a> {
    disk: &'a str,
    bitmap: &'a str,
    at: u64,
}

impl Named<'_> {
    fn misfit(self, blame: Blame, reason: String) -> Error {
        let subject = Subject { disk: self.disk.to_owned(), bitmap: Some(self.bitmap.to_owned()) };
        Error::Misfit { subject, offset: self.at, reason, blame }
    }
}

/// Whether a bitmap of so many `bytes` may be held beside the `total` bytes of others.
fn check_bytes(total: u64, bytes: u64, granularity: u32, size: u64) -> Result<(), String> {
    if bytes > MAX_STORED_BYTES {
        return Err(format!(
            "at a granularity of {granularity} it takes {bytes} bytes for a disk of {size}, and an \
             image holds at most {MAX_STORED_BYTES}"
        ));
    }
    let total = total.saturating_add(bytes);
    if total > MAX_BITMAP_BYTES {
        return Err(format!(
            "with it the bitmaps take {total} bytes, more than the {MAX_BITMAP_BYTES} held here"
        ));
    }
    Ok(())
}
