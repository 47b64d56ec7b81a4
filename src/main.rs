//! The `bitferry` command.

fn main() {}
