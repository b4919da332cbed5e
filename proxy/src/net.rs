//! Sockets: the one place that binds and dials.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};

/// Pending connections that the kernel keeps for us.
const BACKLOG: i32 = 1024;
/// A peer that vanished without a word is noticed after some silence and this many questions.
const SILENCE: Duration = Duration::from_secs(20);
const ASK_AGAIN: Duration = Duration::from_secs(5);
const QUESTIONS: u32 = 3;
/// So is one that takes nothing for this long of what it was sent.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);

/// Binds a listener that several workers can share (`SO_REUSEPORT`): bind port 0 once, the rest to the port
/// that was chosen. The kernel then spreads connections over the workers.
///
/// # Errors
/// When the address is taken or not ours.
pub fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Makes sure that nobody else listens on the address: `SO_REUSEPORT` alone would let two sidecars of one user
/// share a port in silence.
///
/// # Errors
/// When somebody does.
pub fn check_free(address: SocketAddr) -> io::Result<()> {
    if address.port() == 0 {
        return Ok(());
    }
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(1)
}

/// Hands a bound listener to the current runtime.
///
/// # Errors
/// When called outside a runtime.
pub fn adopt(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    TcpListener::from_std(listener)
}

/// Dials, without Nagle's delay.
///
/// # Errors
/// As the kernel says.
pub async fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Has the kernel notice a peer that vanished. The other kernel answers, however busy the peer is.
///
/// # Errors
/// As the kernel says.
pub fn watch(stream: &TcpStream) -> io::Result<()> {
    let keepalive = TcpKeepalive::new().with_time(SILENCE).with_interval(ASK_AGAIN);
    SockRef::from(stream).set_tcp_keepalive(&keepalive.with_retries(QUESTIONS))
}

/// The same, also while something is on its way to the peer, when keepalive does not ask. For protocols with windows of
/// their own: a peer that does not read its connection at all is given up, too.
///
/// # Errors
/// As the kernel says.
pub fn watch_writes(stream: &TcpStream) -> io::Result<()> {
    watch(stream)?;
    SockRef::from(stream).set_tcp_user_timeout(Some(UNACKNOWLEDGED))
}
