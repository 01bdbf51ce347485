//! What a visitor must pass before anything of theirs reaches an origin.

pub mod identity;
pub mod providers;
