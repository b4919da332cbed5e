//! As much of RFC 6455 as echoing short texts takes, for both sides.

use http::{HeaderMap, Response, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// The RFC's own example of a key (section 1.3), and what accepts it: every client here offers this one.
pub(crate) const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

const TEXT: u8 = 1;
const CLOSE: u8 = 8;
/// A mask only has to be there.
const MASK: [u8; 4] = *b"mask";

/// Whether a request asks for a WebSocket.
pub(crate) fn is_asked(headers: &HeaderMap) -> bool {
    headers
        .get(header::UPGRADE)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// The server's yes.
pub(crate) fn accepted() -> Response<()> {
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_ACCEPT, ACCEPT)
        .body(())
        .unwrap()
}

/// Sends every text back until the client closes. The connection's end ends the task.
pub(crate) fn echo(upgrade: OnUpgrade) {
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let mut stream = TokioIo::new(upgraded);
        while let Ok(Some(text)) = read(&mut stream).await {
            if write(&mut stream, TEXT, text.as_bytes(), None).await.is_err() {
                return;
            }
        }
        // The client may be gone already.
        write(&mut stream, CLOSE, &[], None).await.ok();
    });
}

/// Sends texts one after the other; what came back.
pub(crate) async fn talk(
    response: &mut Response<hyper::body::Incoming>,
    texts: &[String],
) -> Result<Vec<String>, String> {
    if response.headers().get(header::SEC_WEBSOCKET_ACCEPT).is_none_or(|accept| accept != ACCEPT) {
        return Err("the 101 does not accept the WebSocket key".to_owned());
    }
    let upgraded = hyper::upgrade::on(response).await.map_err(|error| error.to_string())?;
    let mut stream = TokioIo::new(upgraded);
    let mut replies = Vec::new();
    for text in texts {
        let sent = write(&mut stream, TEXT, text.as_bytes(), Some(MASK)).await;
        sent.map_err(|error| format!("the WebSocket broke: {error}"))?;
        match read(&mut stream).await {
            Ok(Some(reply)) => replies.push(reply),
            Ok(None) => return Err("the WebSocket was closed".to_owned()),
            Err(error) => return Err(format!("the WebSocket broke: {error}")),
        }
    }
    // The server may close first.
    write(&mut stream, CLOSE, &[], Some(MASK)).await.ok();
    Ok(replies)
}

async fn write(
    stream: &mut (impl AsyncWrite + Unpin),
    opcode: u8,
    payload: &[u8],
    mask: Option<[u8; 4]>,
) -> std::io::Result<()> {
    let masked = if mask.is_some() { 0x80 } else { 0 };
    let mut frame = vec![0x80 | opcode];
    match u8::try_from(payload.len()) {
        Ok(length @ 0..=125) => frame.push(masked | length),
        Ok(_) | Err(_) => {
            let length = u16::try_from(payload.len()).map_err(std::io::Error::other)?;
            frame.push(masked | 126);
            frame.extend(length.to_be_bytes());
        }
    }
    frame.extend(mask.iter().flatten());
    // Without a mask, that changes nothing.
    let mask = mask.unwrap_or_default();
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    stream.write_all(&frame).await
}

/// The next text; `None` at the end. Other frames are passed over.
async fn read(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Option<String>> {
    loop {
        let opcode = stream.read_u8().await? & 0x0f;
        let second = stream.read_u8().await?;
        let length = match second & 0x7f {
            126 => usize::from(stream.read_u16().await?),
            127 => return Err(std::io::Error::other("a frame of more than 64 KiB")),
            length => usize::from(length),
        };
        let mut mask = [0; 4];
        if second & 0x80 != 0 {
            stream.read_exact(&mut mask).await?;
        }
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await?;
        for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
            *byte ^= mask;
        }
        match opcode {
            TEXT => return String::from_utf8(payload).map(Some).map_err(std::io::Error::other),
            CLOSE => return Ok(None),
            _ => {}
        }
    }
}
