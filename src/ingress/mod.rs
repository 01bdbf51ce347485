//! The listeners that visitors reach, and the way of a visitor from the first
//! byte on.

pub mod hello;
pub mod listener;
