//! Pages of nodes: some in memory, the others in an unlinked file.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use format_spec::content_hash::Node;
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::{PAGE_UNITS, Room};
use crate::error::{Error, Result};

/// Bytes of a page.
const PAGE_BYTES: u64 = PAGE_UNITS * 32;
/// How many names are tried for a file on file systems that know no nameless ones.
const ATTEMPTS: u32 = 64;

#[derive(Debug, Default)]
struct Slot {
    /// The nodes, unless they lie in the file.
    nodes: Option<Box<[Node]>>,
    /// Whether the file does not hold them as they are.
    is_dirty: bool,
    /// Used since it was last looked at.
    is_recent: bool,
    /// What they fold to, if that is known.
    folded: Option<Node>,
}

/// Pages by number.
#[derive(Debug)]
pub(super) struct Shelf {
    room: Room,
    slots: BTreeMap<u64, Slot>,
    /// Pages in memory, in the order in which they are looked at when one must go. Some entries may
    /// be of pages that are gone.
    queue: VecDeque<u64>,
    held: usize,
    file: Option<File>,
}

impl Shelf {
    pub(super) fn new(room: Room) -> Self {
        Self { room, slots: BTreeMap::new(), queue: VecDeque::new(), held: 0, file: None }
    }

    /// Whether the page is here.
    pub(super) fn has(&self, page: u64) -> bool {
        self.slots.contains_key(&page)
    }

    /// The first page from `page` on that is here.
    pub(super) fn next(&self, page: u64) -> Option<u64> {
        self.slots.range(page..).next().map(|(page, _)| *page)
    }

    /// Adds a page.
    pub(super) fn put(&mut self, page: u64, nodes: Box<[Node]>) -> Result<()> {
        self.make_room()?;
        let slot = Slot { nodes: Some(nodes), is_dirty: true, is_recent: true, folded: None };
        self.slots.insert(page, slot);
        self.queue.push_back(page);
        self.held = self.held.saturating_add(1);
        Ok(())
    }

    /// Removes pages.
    pub(super) fn remove(&mut self, pages: Range<u64>) {
        while let Some(page) = self.next(pages.start).filter(|page| *page < pages.end) {
            let gone = self.slots.remove(&page);
            if gone.is_some_and(|slot| slot.nodes.is_some()) {
                self.held = self.held.saturating_sub(1);
            }
        }
    }

    /// The nodes of a page that is here.
    pub(super) fn nodes(&mut self, page: u64) -> Result<&[Node]> {
        self.fetch(page)?;
        let slot = self.slots.entry(page).or_default();
        slot.is_recent = true;
        Ok(slot.nodes.as_deref().unwrap_or_default())
    }

    /// The nodes of a page that is here, to be changed.
    pub(super) fn nodes_mut(&mut self, page: u64) -> Result<&mut [Node]> {
        self.fetch(page)?;
        let slot = self.slots.entry(page).or_default();
        (slot.is_recent, slot.is_dirty, slot.folded) = (true, true, None);
        Ok(slot.nodes.as_deref_mut().unwrap_or_default())
    }

    /// What a page folds to, if that was noted since it changed.
    pub(super) fn folded(&self, page: u64) -> Option<Node> {
        self.slots.get(&page).and_then(|slot| slot.folded)
    }

    /// Notes what a page folds to.
    pub(super) fn set_folded(&mut self, page: u64, node: Node) {
        if let Some(slot) = self.slots.get_mut(&page) {
            slot.folded = Some(node);
        }
    }

    /// Brings a page into memory.
    fn fetch(&mut self, page: u64) -> Result<()> {
        if self.slots.get(&page).is_none_or(|slot| slot.nodes.is_some()) {
            return Ok(());
        }
        self.make_room()?;
        let mut nodes = vec![[0; 32]; usize::try_from(PAGE_UNITS).unwrap_or_default()];
        if let Some(file) = &self.file {
            file.read_exact_at(nodes.as_flattened_mut(), page.saturating_mul(PAGE_BYTES))
                .map_err(failed("read"))?;
        }
        if let Some(slot) = self.slots.get_mut(&page) {
            (slot.nodes, slot.is_dirty) = (Some(nodes.into_boxed_slice()), false);
            self.held = self.held.saturating_add(1);
            self.queue.push_back(page);
        }
        Ok(())
    }

    /// Second chance: the first page in the queue that was not used since it was last there goes to
    /// the file.
    fn make_room(&mut self) -> Result<()> {
        while self.held >= self.room.pages.max(1) {
            let Some(page) = self.queue.pop_front() else { break };
            let Some(slot) = self.slots.get_mut(&page).filter(|slot| slot.nodes.is_some()) else {
                continue;
            };
            if std::mem::take(&mut slot.is_recent) {
                self.queue.push_back(page);
                continue;
            }
            if slot.is_dirty {
                if self.file.is_none() {
                    self.file = Some(nameless(&self.room.directory).map_err(failed("create"))?);
                }
                if let (Some(file), Some(nodes)) = (&self.file, &slot.nodes) {
                    file.write_all_at(nodes.as_flattened(), page.saturating_mul(PAGE_BYTES))
                        .map_err(failed("write"))?;
                }
            }
            (slot.nodes, slot.is_dirty) = (None, false);
            self.held = self.held.saturating_sub(1);
        }
        // A page that was removed and came again may stand in the queue more than once.
        if self.queue.len() > self.held.saturating_mul(2).saturating_add(16) {
            let slots = &self.slots;
            let mut seen = std::collections::BTreeSet::new();
            let is_held = |page: &u64| slots.get(page).is_some_and(|slot| slot.nodes.is_some());
            self.queue.retain(|page| is_held(page) && seen.insert(*page));
        }
        Ok(())
    }
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Ledger { action, source }
}

/// A file without a name, which the system removes with its last descriptor.
fn nameless(directory: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match openat(CWD, directory, flags | OFlags::TMPFILE, mode) {
        Ok(file) => return Ok(file.into()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::NOENT) => {
        }
        Err(errno) => return Err(errno.into()),
    }
    let process = std::process::id();
    for attempt in 0..ATTEMPTS {
        let path = directory.join(format!(".bitferry-ledger-{process}-{attempt}"));
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        match file {
            Ok(file) => return std::fs::remove_file(&path).map(|()| file),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}
