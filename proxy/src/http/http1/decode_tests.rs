//! Tests of response decoding.

use super::*;

fn of(text: &str, method: &Method) -> Result<Option<Head>, WireError> {
    head(&mut BytesMut::from(text), method)
}

fn framing_of(text: &str) -> Framing {
    of(text, &Method::GET).unwrap().unwrap().framing
}

#[test]
fn a_body_ends_where_the_rfc_says() {
    assert_eq!(framing_of("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"), Framing::Length(5));
    assert_eq!(framing_of("HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n"), Framing::Length(5));
    assert_eq!(framing_of("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), Framing::Ended);
    assert_eq!(framing_of("HTTP/1.1 204 No\r\ncontent-length: 5\r\n\r\n"), Framing::Ended);
    assert_eq!(framing_of("HTTP/1.1 200 OK\r\n\r\n"), Framing::Close);
    let both = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: Chunked\r\n\r\n";
    let both = of(both, &Method::GET).unwrap().unwrap();
    assert_eq!(both.framing, Framing::Chunked(Chunk::Size));
    assert!(!both.response.headers().contains_key("content-length"));
    let head = of("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", &Method::HEAD).unwrap().unwrap();
    assert_eq!(head.framing, Framing::Ended);
    assert_eq!(head.response.headers()["content-length"], "5");
}

#[test]
fn an_ambiguous_end_is_an_error() {
    for text in [
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: +5\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: x\r\n\r\n",
        "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        "HTTP/1.1 101 Switching\r\n\r\n",
        "nonsense\r\n\r\n",
    ] {
        assert!(of(text, &Method::GET).is_err(), "{text}");
    }
}

#[test]
fn heads_come_in_pieces_and_after_interim_ones() {
    let text =
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nx: \r\nconnection: close\r\n\r\nrest";
    for cut in 0..text.len() - 4 {
        assert!(head(&mut BytesMut::from(&text[..cut]), &Method::GET).unwrap().is_none(), "{cut}");
    }
    let mut buffer = BytesMut::from(text);
    let found = head(&mut buffer, &Method::GET).unwrap().unwrap();
    assert_eq!(&buffer[..], b"rest");
    assert!(!found.keep_alive);
    assert_eq!(found.response.headers()["x"], "");
}

fn decode(text: &[u8], step: usize) -> Result<(Vec<u8>, Option<HeaderMap>), WireError> {
    let (mut buffer, mut at, mut data) = (BytesMut::new(), Chunk::Size, Vec::new());
    for part in text.chunks(step) {
        buffer.extend_from_slice(part);
        while let Some(piece) = chunk(&mut buffer, &mut at)? {
            match piece {
                Piece::Data(bytes) => data.extend_from_slice(&bytes),
                Piece::Trailers(trailers) => return Ok((data, Some(trailers))),
                Piece::End => return Ok((data, None)),
            }
        }
    }
    Err(WireError::Closed)
}

#[test]
fn chunks_come_in_pieces_of_any_size() {
    let text = b"5;a=b\r\nhello\r\n1\r\n!\r\n0\r\nx-sum: 6\r\n\r\n";
    for step in 1..text.len() {
        let (data, trailers) = decode(text, step).unwrap();
        assert_eq!(data, b"hello!");
        assert_eq!(trailers.unwrap()["x-sum"], "6");
    }
    assert_eq!(decode(b"0\r\n\r\n", 1).unwrap(), (Vec::new(), None));
}

#[test]
fn broken_chunks_are_errors() {
    for text in [
        &b"x\r\n"[..],
        b"\r\n",
        b";a\r\n",
        b"5\r\nhelloXX",
        b"FFFFFFFFFFFFFFFFF\r\n",
        b"-1\r\n",
        b"0\r\n:\r\n\r\n",
    ] {
        assert!(decode(text, 1).is_err(), "{text:?}");
    }
}
