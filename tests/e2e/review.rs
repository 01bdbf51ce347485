//! What went wrong once where several parts meet: slow links, early ends, and
//! who may take which name.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

/// The origin ends its own side first and reads late: the visitor's last bytes
/// still wait for the channel's window when both sides have said their end.
/// Where they wait depends on their number, so many numbers are tried.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_arrives_whole_where_the_origin_ended_its_side_first() {
    let node = Node::start().await;
    let origin = tokio::net::TcpSocket::new_v4().unwrap();
    origin.set_recv_buffer_size(16 << 10).unwrap();
    origin.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let origin = origin.listen(64).unwrap();
    let _ssh = Ssh::start(&node, &[&format!("tcp/raw:{}", origin.local_addr().unwrap())]).await;
    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    let mut ends = tokio::task::JoinSet::new();
    for i in 0..48 {
        let bytes = (2 << 20) + i * (64 << 10);
        let mut visitor = TcpStream::connect(addr).await.unwrap();
        let (mut tcp, _) = within(DEADLINE, "a connection", origin.accept()).await.unwrap();
        ends.spawn(async move {
            tcp.shutdown().await.unwrap();
            Pattern::write(bytes, &mut visitor).await.unwrap();
            visitor.shutdown().await.unwrap();
            visitor.read_to_end(&mut Vec::new()).await.unwrap();
            tokio::time::sleep(Duration::from_secs(2)).await;
            (bytes, within(DEADLINE, "the upload", Pattern::read(None, &mut tcp)).await)
        });
    }
    while let Some(end) = ends.join_next().await {
        let (sent, arrived) = end.unwrap();
        assert_eq!(arrived, Ok(sent));
    }
}
