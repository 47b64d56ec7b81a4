//! Disks: devices, plan, copy engine, verification.
