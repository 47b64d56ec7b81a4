//! An existing image that is sent bitmaps and no content: it has the content by another way.
//!
//! Nothing is written before the source has let go. Then one atomic step puts the bitmaps that came
//! in the place of those that have their names ([`BitmapEditor`]): after a kill at any moment the
//! image has all of the old ones or all of the new ones.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use bitmap_mig::Bitmap;
use block_mig::Landing;
use block_mig::device::ChainSource;
use block_mig::limits::workers;
use format_spec::content_hash::ContentHash;
use mig_core::block::BlockSink;
use mig_core::section::Fate;
use mig_core::stream;
use qcow2_file::bitmaps::{BitmapEditor, PersistentBitmap};

use super::target::Target;
use super::{Existing, lock};
use crate::berth::{Closed, Receipt, log_of};
use crate::hash::content;
use crate::incoming::{Place, Sealed, SessionId};
use crate::report::BitmapReport;
use crate::{DiskProof, Error, Observer, Phase, Result};

/// An image whose bitmaps come, and nothing else.
pub(super) struct OnlyBitmaps {
    target: Arc<Target>,
    closed: Closed,
    session: SessionId,
    /// The change, once it is known; and what is to be found afterwards.
    change: Mutex<Option<BitmapEditor>>,
    stored: Mutex<Vec<PersistentBitmap>>,
    receipt: Mutex<Option<Receipt>>,
    observer: Arc<dyn Observer>,
}

impl OnlyBitmaps {
    /// A disk of so many bytes is introduced for the sake of its bitmaps.
    pub(super) fn begin(
        target: Arc<Target>,
        size: u64,
        session: SessionId,
        observer: &Arc<dyn Observer>,
    ) -> Result<Self> {
        let found = target.chain.virtual_size();
        if found != size {
            return Err(target.other_size(found, size));
        }
        if target.is_unfinished() {
            let path = target.path.display();
            let reason = format!(
                "{path} is what an interrupted in-place copy left, and bitmaps alone do not \
                 complete it: run that copy again first"
            );
            return Err(Error::Usage { reason });
        }
        let (change, stored, receipt) = (Mutex::default(), Mutex::default(), Mutex::default());
        let (closed, observer) = (Closed(size), observer.clone());
        Ok(Self { target, closed, session, change, stored, receipt, observer })
    }

    /// What the disk reads as, where the source says what that has to be: it rarely does, since it
    /// would have to read all of its own.
    fn content(&self, sealed: &Sealed) -> Result<Option<ContentHash>> {
        let Some(said) = sealed.content else { return Ok(None) };
        let found = self.target.reopen()?;
        let disk = ChainSource(&found.chain);
        let read = content(&disk, workers(None), None, (Phase::Prove, &*self.observer))?;
        if read == said {
            return Ok(Some(read));
        }
        let reason = format!("the source has {said}, {read} was read");
        Err(Error::ProofMismatch { path: self.target.path.clone(), reason })
    }

    fn plan(&self, sealed: &Sealed) -> Result<DiskProof> {
        let bitmaps = sealed.bitmaps.iter().map(Bitmap::digest).collect::<Result<_, _>>()?;
        let proof = DiskProof { content: self.content(sealed)?, bitmaps };
        let receipt = self.target.receipt((self.session, self.closed.0), sealed, Some(&proof))?;
        *lock(&self.receipt) = Some(Receipt { is_bitmaps_alone: true, ..receipt });
        if sealed.bitmaps.is_empty() {
            return Ok(proof);
        }
        let mut editor = BitmapEditor::open(self.target.chain.top().file().clone())?;
        let mut stored = Vec::new();
        for bitmap in &sealed.bitmaps {
            let bitmap = bitmap.clone().into_stored_as(&bitmap.name);
            if editor.list().iter().any(|found| found.name() == bitmap.name) {
                editor.remove(&bitmap.name)?;
            }
            editor.add(bitmap.clone())?;
            stored.push(bitmap);
        }
        *lock(&self.change) = Some(editor);
        *lock(&self.stored) = stored;
        Ok(proof)
    }
}

impl Existing for OnlyBitmaps {
    fn target(&self) -> &Target {
        &self.target
    }

    /// The new bitmaps take the place of the old ones.
    fn finish(&self) -> Result<Vec<BitmapReport>> {
        let Some(editor) = lock(&self.change).take() else { return Ok(Vec::new()) };
        let (path, devices) = self.target.log_place();
        // What an earlier transfer said of it is not so any more.
        log_of(path, devices)?.map_or(Ok(()), |log| log.remove_receipt())?;
        editor.commit()?;
        self.target.holds(&lock(&self.stored))
    }

    fn end(&self) -> Result<()> {
        let (path, devices) = self.target.log_place();
        let log = log_of(path, devices)?.filter(|_| self.target.can_have_receipt());
        match (log, lock(&self.receipt).take()) {
            (Some(log), Some(mut receipt)) => {
                receipt.look(self.target.files())?;
                receipt.write(&log)
            }
            _ => Ok(()),
        }
    }

    fn leave(&self, _fate: Fate) -> Result<()> {
        Ok(())
    }
}

impl Landing for OnlyBitmaps {
    fn sink(&self) -> &dyn BlockSink {
        &self.closed
    }

    fn begin(&self, _range: Range<u64>) -> stream::Result<()> {
        let path = self.target.path.display();
        let reason = format!(
            "{path} exists, and what the source does not send is to be there already: content for \
             a part of it is taken by a new image alone, receive --backing"
        );
        Err(Error::Unfit { reason }.into())
    }
}

impl Place for OnlyBitmaps {
    fn bitmap_name(&self, sent: &str) -> stream::Result<String> {
        Ok(self.target.bitmap_name(sent)?)
    }

    fn prepare(&self, sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        Ok(Some(self.plan(sealed)?))
    }
}
