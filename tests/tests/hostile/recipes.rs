//! What a recipe is.

use bitferry_tests::image::Bytes;

use crate::bases::Base;

/// One way to break an image, and what must come of it.
pub(crate) struct Recipe {
    pub(crate) name: String,
    pub(crate) base: Base,
    pub(crate) patch: Box<dyn Fn(&Bytes) + Send>,
    pub(crate) verdict: Verdict,
    /// Nothing may write to it: metadata is wrong although data may be readable.
    pub(crate) is_untouchable: bool,
}

/// What the verbs say to a broken image. The text is looked for in the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// No verb gets past the header: exit 5.
    Header(&'static str),
    /// It asks for what is not there: exit 3.
    Unsupported(&'static str),
    /// `info` may do, whatever reads content fails: exit 5.
    Content(&'static str),
    /// Bitmaps are broken: what wants them fails with 5 or 7, what does not may do.
    Bitmaps(&'static str),
    /// It is odd and sound: it reads as QEMU reads it.
    Sound,
    /// Anything but a crash.
    Any,
}

pub(crate) fn recipe(
    base: Base,
    name: impl Into<String>,
    verdict: Verdict,
    patch: impl Fn(&Bytes) + Send + 'static,
) -> Recipe {
    let is_broken = !matches!(verdict, Verdict::Sound | Verdict::Any);
    let patch = Box::new(patch);
    Recipe { name: name.into(), base, patch, verdict, is_untouchable: is_broken }
}

impl Recipe {
    /// Nothing may write to it.
    pub(crate) fn untouchable(mut self) -> Self {
        self.is_untouchable = true;
        self
    }

    /// Although it is refused for reading, some writer may mend or replace what is wrong.
    pub(crate) fn touchable(mut self) -> Self {
        self.is_untouchable = false;
        self
    }
}
