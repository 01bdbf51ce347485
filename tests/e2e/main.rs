//! Real nodes, real clients, real origins: one scenario per file.

fn main() {}
