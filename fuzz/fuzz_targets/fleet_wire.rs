#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| adit::fleet::fuzz_wire(bytes));
