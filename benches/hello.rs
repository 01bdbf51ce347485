//! How long it takes to tell what a connection speaks. Paid once per connection.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::hint::black_box;
use std::sync::Arc;

use adit::ingress::hello::{HelloSettings, Verdict, read};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};

/// The first flight of a real client, about 1.6 KB with its post-quantum key share.
fn client_hello() -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = "web.customer.example.com".try_into().unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// The same message in records of `size` bytes.
fn fragmented(hello: &[u8], size: usize) -> Vec<u8> {
    let record = |body: &[u8]| [&[22, 3, 1, 0, u8::try_from(body.len()).unwrap()][..], body].concat();
    hello[5..].chunks(size).flat_map(record).collect()
}

/// As a visitor writing single bytes makes us work: every call that `More` asks for.
fn drip(bytes: &[u8], max: usize) -> Verdict {
    let mut here = 0;
    loop {
        match read(&bytes[..here], max) {
            Verdict::More(needed) => here = needed,
            verdict => return verdict,
        }
    }
}

fn benches(c: &mut Criterion) {
    let max = HelloSettings::default().max;
    let hello = client_hello();
    let mut group = c.benchmark_group("hello");
    group.bench_function("tls, one record", |b| b.iter(|| read(black_box(&hello), max)));
    let pieces = fragmented(&hello, 200);
    group.bench_function("tls, records of 200 bytes", |b| b.iter(|| read(black_box(&pieces), max)));
    let hostile = fragmented(&hello, 1);
    group.bench_function("tls, records of 1 byte, dripped", |b| b.iter(|| drip(black_box(&hostile), max)));
    group.bench_function("http/1", |b| b.iter(|| read(black_box(b"GET / HTTP/1.1\r\n"), max)));
    group.bench_function("ssh", |b| b.iter(|| read(black_box(b"SSH-2.0-OpenSSH_9.9\r\n"), max)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    group.bench_function("peek, with its deadline", |b| {
        b.iter_batched(
            || hello.clone(),
            |bytes| {
                runtime.block_on(async { adit::ingress::hello::peek(&mut &bytes[..], &HelloSettings::default()).await })
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(hello, benches);
criterion_main!(hello);
