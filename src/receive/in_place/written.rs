//! An existing image while its disk comes.

use std::ops::Range;
use std::sync::{Arc, Mutex, RwLock};

use bitmap_mig::Bitmap;
use block_mig::Landing;
use block_mig::device::{ChainSource, RawSink, StartOf};
use block_mig::journal::{Identity, Keeper};
use block_mig::limits::workers;
use format_spec::content_hash::Node;
use mig_core::block::BlockSink;
use mig_core::section::{Fate, Have};
use mig_core::stream;
use qcow2_file::Storage;
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::storage::{Watched, Writes};

use super::sink::Sink;
use super::target::Target;
use super::{Existing, lock};
use crate::berth::{Finds, Kept, Prover, Receipt};
use crate::copy::{Format, open_editor_in, suspend};
use crate::hash::content;
use crate::incoming::{Place, Sealed, SessionId};
use crate::report::BitmapReport;
use crate::{DiskProof, Error, Observer, Phase, Result};

/// An existing image that is written.
pub(super) struct Written {
    target: Arc<Target>,
    /// Bytes of the disk that came.
    size: u64,
    /// Ends before the image is closed.
    prover: Option<Prover>,
    sink: Arc<Sink>,
    session: SessionId,
    kept: Option<Kept>,
    observer: Arc<dyn Observer>,
    stored: Mutex<Vec<PersistentBitmap>>,
    receipt: Mutex<Option<Receipt>>,
}

impl Written {
    /// The disk of an image comes, with so many bytes. The journal of its session is gone on with,
    /// or begun: anew where nothing `resumes`.
    pub(super) fn begin(
        target: Arc<Target>,
        size: u64,
        (session, resumes, is_fresh): (SessionId, bool, bool),
        observer: &Arc<dyn Observer>,
    ) -> Result<Self> {
        let writes = Arc::new(Writes::new(size, target.cluster_bits()));
        let sink = Arc::new(open(&target, size, &writes)?);
        let of = (size, writes);
        let is_proved = resumes && target.stands_alone();
        // What arrives is noted when it arrives.
        let finds = Finds::<Sink> { disk: |sink| sink, keeper: |_| None };
        let prover = is_proved.then(|| Prover::start(&sink, finds, of)).transpose()?;
        let identity = Identity { session, size, target: target.words() };
        let kept = Kept::begin(target.log_place(), Some(identity), (resumes, is_fresh));
        // Nothing is written: its bitmaps are what they were.
        let kept = kept.inspect_err(|_| sink.take().into_iter().for_each(suspend))?;
        let (observer, stored, receipt) = (observer.clone(), Mutex::default(), Mutex::default());
        Ok(Self { target, size, prover, sink, session, kept, observer, stored, receipt })
    }

    fn prove(&self, sealed: &Sealed) -> Result<Option<DiskProof>> {
        self.observer.phase(Phase::Seal);
        self.checkpoint()?;
        *lock(&self.stored) = self.sink.add(&sealed.bitmaps)?;
        self.prover.iter().for_each(Prover::stop);
        let Some(said) = sealed.content else {
            return self.note_receipt(sealed, None).map(|()| None);
        };
        let found = self.target.reopen()?;
        self.observer.phase(Phase::Prove);
        let read = match &self.prover {
            Some(prover) => prover.finish(&found.chain, None, &*self.observer)?.content,
            None => {
                let whole = ChainSource(&found.chain);
                let disk = StartOf { disk: &whole, size: self.size };
                content(&disk, workers(None), None, (Phase::Prove, &*self.observer))?
            }
        };
        if read != said {
            let reason = format!("{said} was sent, {read} was read");
            return Err(Error::ProofMismatch { path: self.target.path.clone(), reason });
        }
        // They become valid, and are read back, when the source has let go.
        let bitmaps = sealed.bitmaps.iter().map(Bitmap::digest).collect::<Result<_, _>>()?;
        let proof = DiskProof { content: Some(read), bitmaps };
        self.note_receipt(sealed, Some(&proof))?;
        Ok(Some(proof))
    }

    /// What the receipt will say.
    fn note_receipt(&self, sealed: &Sealed, proof: Option<&DiskProof>) -> Result<()> {
        let receipt = self.target.receipt((self.session, self.size), sealed, proof)?;
        *lock(&self.receipt) = Some(receipt);
        Ok(())
    }

    fn checkpoint(&self) -> Result<()> {
        match &self.kept {
            Some(kept) => kept.checkpoint(|| self.sink.sync()),
            None => Ok(self.sink.sync()?),
        }
    }

    /// What notes which parts have arrived, where they can be gone on with.
    fn keeper(&self) -> Option<&Keeper> {
        self.kept.as_ref().and_then(Kept::keeper)
    }
}

impl Existing for Written {
    fn target(&self) -> &Target {
        &self.target
    }

    fn finish(&self) -> Result<Vec<BitmapReport>> {
        let Some(editor) = self.sink.take() else { return Ok(Vec::new()) };
        editor.close()?;
        self.target.holds(&lock(&self.stored))
    }

    /// The receipt takes the journal's place. Where there can be none, the journal stays, which is
    /// read again before it is believed.
    fn end(&self) -> Result<()> {
        let Some(kept) = self.kept.as_ref().filter(|_| self.target.can_have_receipt()) else {
            return Ok(());
        };
        if let Some(mut receipt) = lock(&self.receipt).take() {
            receipt.look(self.target.files())?;
            receipt.write(kept.log())?;
        }
        kept.end()
    }

    /// The mark of what was written stays; its own bitmaps have recorded it.
    fn leave(&self, fate: Fate) -> Result<()> {
        let left = match (&self.kept, fate) {
            (Some(_), Fate::Kept | Fate::Revoked) => self.checkpoint(),
            (Some(kept), Fate::Dropped) => kept.end(),
            (None, _) => Ok(()),
        };
        self.prover.iter().for_each(Prover::stop);
        self.sink.take().into_iter().for_each(suspend);
        left
    }
}

/// Opens an image to be written.
fn open(target: &Target, size: u64, writes: &Arc<Writes>) -> Result<Sink> {
    let watched = |file: Arc<dyn Storage>| {
        Arc::new(Watched::new(file, Arc::clone(writes))) as Arc<dyn Storage>
    };
    if target.format == Format::Raw {
        let file = target.chain.files().first().map(|files| Arc::clone(&files.file));
        let file = file.ok_or_else(|| target.other_size(0, size))?;
        target.fit(&file, size)?;
        return Ok(Sink::Raw(RawSink::new(watched(file), size)));
    }
    let found = target.chain.virtual_size();
    if found != size {
        return Err(target.other_size(found, size));
    }
    let file = watched(target.chain.top().file().clone());
    let editor = open_editor_in(&target.chain, file, target.allow_backing)?;
    Ok(Sink::Qcow2 { editor: Box::new(RwLock::new(Some(editor))), size })
}

impl Landing for Written {
    fn sink(&self) -> &dyn BlockSink {
        &*self.sink
    }

    fn have(&self, tell: &mut dyn FnMut(Have) -> stream::Result<()>) -> stream::Result<()> {
        let Some(kept) = self.kept.as_ref().filter(|kept| kept.is_resumed) else { return Ok(()) };
        kept.recheck(&*self.sink, None, workers(None), &*self.observer)?;
        self.observer.phase(Phase::Transfer);
        kept.tell(&mut |have| {
            self.prover.iter().for_each(|prover| prover.told(&have));
            tell(have)
        })
    }

    fn wants_nodes(&self) -> bool {
        self.keeper().is_some()
    }

    fn begin(&self, range: Range<u64>) -> stream::Result<()> {
        self.prover.iter().for_each(|prover| prover.begin(range.clone()));
        Ok(self.keeper().map_or(Ok(()), |keeper| keeper.begin(range))?)
    }

    fn arrived(&self, range: Range<u64>, first: u64, nodes: &[Node]) -> stream::Result<()> {
        self.prover.iter().for_each(|prover| prover.arrived(range.clone()));
        let Some(keeper) = self.keeper() else { return Ok(()) };
        if keeper.units_landed(first, nodes)? { Ok(self.checkpoint()?) } else { Ok(()) }
    }

    fn arrived_zeroes(&self, range: Range<u64>) -> stream::Result<()> {
        self.prover.iter().for_each(|prover| prover.arrived_zeroes(range.clone()));
        Ok(self.keeper().map_or(Ok(()), |keeper| keeper.zeroes_landed(range))?)
    }

    fn settled(&self) {
        self.prover.iter().for_each(Prover::settled);
    }

    fn durable(&self) -> stream::Result<()> {
        self.checkpoint()?;
        // A guest may be paused next: what it would have to wait for is done before.
        self.prover.iter().for_each(Prover::wait);
        Ok(())
    }
}

impl Place for Written {
    fn bitmap_name(&self, sent: &str) -> stream::Result<String> {
        Ok(self.target.bitmap_name(sent)?)
    }

    fn prepare(&self, sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        Ok(self.prove(sealed)?)
    }
}
