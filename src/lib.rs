//! Move VM disk images with their backup bitmaps.
