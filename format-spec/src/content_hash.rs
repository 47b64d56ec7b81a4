//! The guest-visible content hash and the bitmap digest. SPEC chapter 2.
//!
//! A hash tree over fixed leaves in which a subtree of zeroes has the same hash wherever it stands:
//! a sparse disk costs what its data costs. Leaves may arrive in any order and from many threads;
//! see [`Tree`].
