//! Which socket listens at an address of this machine: another one since the last time means another process, or one that
//! began anew, however short it was away. A connection that is kept open would tell the same, but would be all that an
//! application with one worker has.
//!
//! Asks the kernel by `NETLINK_SOCK_DIAG` (`man 7 sock_diag`), which needs no privilege.

use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

const AF_NETLINK: i32 = 16;
const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const IPPROTO_TCP: u8 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const TCP_LISTEN: u8 = 10;
/// Header and `inet_diag_req_v2`.
const REQUEST_BYTES: u32 = 72;

/// A number that no other socket of this machine has had. `None` when nobody listens there, or the kernel does not say.
pub(super) fn at(address: SocketAddr) -> Option<u64> {
    cookie(&ask(address).ok()?)
}

fn ask(address: SocketAddr) -> io::Result<Vec<u8>> {
    let (domain, protocol) = (Domain::from(AF_NETLINK), Protocol::from(NETLINK_SOCK_DIAG));
    let socket = Socket::new(domain, Type::DGRAM, Some(protocol))?;
    socket.set_nonblocking(true)?;
    // Answered by the time that it is sent.
    socket.send(&request(address))?;
    let mut answer = vec![0; 1024];
    let length = (&socket).read(&mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

fn request(address: SocketAddr) -> Vec<u8> {
    let (family, mut ip) = match address.ip() {
        IpAddr::V4(ip) => (AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (AF_INET6, ip.octets().to_vec()),
    };
    ip.resize(16, 0);
    let (sequence, from, interface, any_state) = (1_u32, 0_u32, 0_u32, u32::MAX);
    let mut bytes = Vec::new();
    // nlmsghdr
    bytes.extend(REQUEST_BYTES.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    bytes.extend([sequence, from].map(u32::to_ne_bytes).concat());
    // inet_diag_req_v2
    bytes.extend([family, IPPROTO_TCP, 0, 0]);
    bytes.extend(any_state.to_ne_bytes());
    // inet_diag_sockid: from here, to whomever, on any interface, without knowing the cookie.
    bytes.extend(address.port().to_be_bytes());
    bytes.extend([0; 2]);
    bytes.extend(ip);
    bytes.extend([0; 16]);
    bytes.extend([interface, u32::MAX, u32::MAX].map(u32::to_ne_bytes).concat());
    bytes
}

/// Of an `inet_diag_msg` about a socket that listens.
fn cookie(answer: &[u8]) -> Option<u64> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let listens = *answer.get(17)? == TCP_LISTEN;
    let cookie = u64::from_ne_bytes(answer.get(60..68)?.try_into().ok()?);
    (kind == SOCK_DIAG_BY_FAMILY && listens).then_some(cookie)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_listener_is_known_and_the_next_one_is_another() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(first) = TcpListener::bind(host) else { continue };
            let address = first.local_addr().unwrap();
            let known = at(address);
            assert!(known.is_some());
            assert_eq!(at(address), known);
            drop(first);
            assert_eq!(at(address), None);
            let _second = TcpListener::bind(address).unwrap();
            let next = at(address);
            assert!(next.is_some() && next != known);
        }
    }

    #[test]
    fn it_counts_whatever_address_it_listens_on() {
        let all = TcpListener::bind("0.0.0.0:0").unwrap();
        let here = SocketAddr::from(([127, 0, 0, 1], all.local_addr().unwrap().port()));
        assert!(at(here).is_some());
    }

    #[test]
    fn an_answer_that_says_something_else_is_none() {
        let request = request(SocketAddr::from(([127, 0, 0, 1], 1)));
        assert_eq!(request.len(), REQUEST_BYTES as usize);
        assert_eq!(cookie(&request), None);
        assert_eq!(cookie(&[0; 20]), None);
    }
}
