//! The framing of HTTP/1.1 requests, read along and stricter than anybody behind it: what two programs could read in
//! two ways is refused, so that no request can be hidden in another (RFC 9112 section 11.2). Pure.
//!
//! What passes has lines that end with CRLF, a request line of three parts, one `Host`, and one way at most to say how
//! long its body is. A request to switch protocols has nothing behind it.

/// The longest head, in bytes: what nginx takes.
pub const MAX_HEAD: usize = 32 * 1024;
/// The most header fields.
pub const MAX_FIELDS: usize = 100;
/// The longest line that announces a chunk: its length in hexadecimal digits. Browsers send no extensions.
const MAX_CHUNK_LINE: usize = 16;

/// What a connection's bytes are, one after the other.
#[derive(Debug)]
pub struct Framing {
    state: State,
    /// The line that is being read, without its end.
    line: Vec<u8>,
    /// Its CR has come.
    returned: bool,
    head: Head,
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum State {
    /// The line of a head.
    Head,
    /// Bytes of a body that are still to come.
    Body(u64),
    /// The line before a chunk.
    Chunk,
    /// Bytes of a chunk that are still to come.
    InChunk(u64),
    /// The end of line behind a chunk.
    BehindChunk,
    /// The fields behind the last chunk.
    Trailer,
    /// Another protocol was asked for.
    Switching,
}

/// What the head has said so far.
#[derive(Debug, Default)]
struct Head {
    bytes: usize,
    fields: usize,
    begun: bool,
    hosts: usize,
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
}

/// Why a byte is not let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// How many bytes before it are fine.
    pub fine: usize,
    /// It belongs to a head, which nobody has read to its end yet.
    pub in_head: bool,
}

impl Default for Framing {
    fn default() -> Self {
        Self::new()
    }
}

impl Framing {
    /// Of a connection that has just begun.
    pub fn new() -> Self {
        Self { state: State::Head, line: Vec::new(), returned: false, head: Head::default() }
    }

    /// Whether nothing may come until the other protocol is spoken.
    pub fn is_switching(&self) -> bool {
        self.state == State::Switching
    }

    /// Whether a request has begun and not ended.
    pub fn is_within(&self) -> bool {
        match self.state {
            State::Head => self.head.begun || !self.line.is_empty(),
            State::Switching => false,
            _ => true,
        }
    }

    /// Reads on.
    ///
    /// # Errors
    /// The first byte that is refused. Nothing must be read after that.
    pub fn read(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        let mut at = 0;
        while at < bytes.len() {
            match &mut self.state {
                State::Body(left) | State::InChunk(left) => {
                    let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len() - at);
                    *left -= taken as u64;
                    at += taken;
                    if *left == 0 {
                        self.state = match self.state {
                            State::InChunk(_) => State::BehindChunk,
                            _ => self.next_head(),
                        };
                    }
                }
                _ => {
                    let refused = Refused { fine: at, in_head: self.state == State::Head };
                    self.read_one(bytes[at]).ok_or(refused)?;
                    at += 1;
                    if self.is_switching() && at < bytes.len() {
                        // The head's last byte is not fine either: nobody shall act on it.
                        return Err(Refused { fine: at - 1, in_head: true });
                    }
                }
            }
        }
        Ok(())
    }

    /// A byte of a line.
    fn read_one(&mut self, byte: u8) -> Option<()> {
        if matches!(self.state, State::Head | State::Trailer) {
            self.head.bytes += 1;
            if self.head.bytes > MAX_HEAD {
                return None;
            }
        }
        match byte {
            b'\n' if self.returned => {
                self.returned = false;
                let line = std::mem::take(&mut self.line);
                self.state = self.line(&line)?;
                // Its memory serves the next one.
                self.line = line;
                self.line.clear();
                Some(())
            }
            _ if self.returned => None,
            b'\r' => {
                self.returned = true;
                Some(())
            }
            b'\n' => None,
            _ => {
                let longest = match self.state {
                    State::Chunk => MAX_CHUNK_LINE,
                    State::BehindChunk => 0,
                    _ => MAX_HEAD,
                };
                if self.line.len() >= longest {
                    return None;
                }
                self.line.push(byte);
                Some(())
            }
        }
    }

    /// A whole line; what comes next.
    fn line(&mut self, line: &[u8]) -> Option<State> {
        match self.state {
            State::Head if !self.head.begun => {
                self.head.begun = true;
                is_request_line(line).then_some(State::Head)
            }
            State::Head if line.is_empty() => self.behind_head(),
            State::Head => self.field(line).map(|()| State::Head),
            State::Chunk => {
                let digits = !line.is_empty() && line.iter().all(u8::is_ascii_hexdigit);
                let text = std::str::from_utf8(line).ok().filter(|_| digits)?;
                Some(match u64::from_str_radix(text, 16).ok()? {
                    0 => State::Trailer,
                    length => State::InChunk(length),
                })
            }
            State::BehindChunk => Some(State::Chunk),
            State::Trailer if line.is_empty() => Some(self.next_head()),
            State::Trailer => {
                let (name, _) = split_field(line)?;
                // What frames, routes or authenticates does not come after the body (RFC 9110 section 6.5.1).
                let early = ["content-length", "transfer-encoding", "host", "cookie", "authorization"];
                self.head.fields += 1;
                let fine = self.head.fields <= MAX_FIELDS
                    && !early.iter().any(|early| name.eq_ignore_ascii_case(early.as_bytes()));
                fine.then_some(State::Trailer)
            }
            State::Body(_) | State::InChunk(_) | State::Switching => None,
        }
    }

    fn field(&mut self, line: &[u8]) -> Option<()> {
        let (name, value) = split_field(line)?;
        let head = &mut self.head;
        head.fields += 1;
        let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
        if is("content-length") {
            let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
            let length = std::str::from_utf8(value).ok().filter(|_| digits)?.parse().ok()?;
            if head.length.replace(length).is_some() {
                return None;
            }
        } else if is("transfer-encoding") {
            if head.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return None;
            }
            head.chunked = true;
        } else if is("host") {
            head.hosts += 1;
        } else if is("upgrade") {
            // What is not asked for here is an ordinary request (RFC 9110 section 7.8).
            head.upgrade |= value.eq_ignore_ascii_case(b"websocket");
        }
        (head.fields <= MAX_FIELDS && head.hosts <= 1 && !(head.chunked && head.length.is_some()))
            .then_some(())
    }

    fn behind_head(&mut self) -> Option<State> {
        let Head { hosts, length, chunked, upgrade, .. } = std::mem::take(&mut self.head);
        let body = chunked || length.is_some_and(|length| length > 0);
        if hosts != 1 || upgrade && body {
            return None;
        }
        Some(match length {
            _ if upgrade => State::Switching,
            _ if chunked => State::Chunk,
            Some(length) if length > 0 => State::Body(length),
            _ => State::Head,
        })
    }

    fn next_head(&mut self) -> State {
        self.head = Head::default();
        State::Head
    }
}

/// `METHOD SP TARGET SP HTTP/1.1` (RFC 9112 section 3), with a target in origin form, or `*`. No tunnels (CONNECT), and
/// no echo of what the browser holds back from its pages (TRACE).
fn is_request_line(line: &[u8]) -> bool {
    let mut parts = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(b"HTTP/1.1"), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    is_token(method)
        && ![&b"CONNECT"[..], b"TRACE"].contains(&method)
        && (target.starts_with(b"/") || method == b"OPTIONS" && target == b"*")
        && target.iter().all(u8::is_ascii_graphic)
        && !target.contains(&b'#')
}

/// Name and value of a field (RFC 9112 section 5), without the white space around the value.
fn split_field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    let fine = |byte: &u8| *byte == b'\t' || *byte >= b' ' && *byte != 0x7f;
    (is_token(name) && value.iter().all(fine)).then(|| (name, value.trim_ascii()))
}

/// RFC 9110 section 5.6.2.
fn is_token(text: &[u8]) -> bool {
    !text.is_empty()
        && text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn verdict(bytes: &[u8]) -> Result<(), Refused> {
        Framing::new().read(bytes)
    }

    #[test]
    fn what_browsers_send_passes() {
        for bytes in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /a?b=%2f;c HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nX: caf\u{e9}\r\n\r\nHEAD / HTTP/1.1\r\nhost:a\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nx\n\0GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n1\r\n\n\r\nfF\r\n",
            "PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            assert_eq!(verdict(bytes.as_bytes()), Ok(()), "{bytes:?}");
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_does_not() {
        let head = "POST / HTTP/1.1\r\nHost: a\r\n";
        let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n");
        let long = format!("{head}X: {}\r\n\r\n", "x".repeat(MAX_HEAD));
        let many = format!("{head}{}\r\n", "X: y\r\n".repeat(MAX_FIELDS));
        for bytes in [
            format!("{head}Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            format!("{head}Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n"),
            format!("{head}Content-Length: 1\r\nContent-Length: 1\r\n\r\n"),
            format!("{head}Content-Length: 1\r\nContent-Length: 2\r\n\r\n"),
            format!("{head}Content-Length: 1, 1\r\n\r\n"),
            format!("{head}Content-Length: +1\r\n\r\n"),
            format!("{head}Content-Length: 0x1\r\n\r\n"),
            format!("{head}Content-Length:\r\n\r\n"),
            format!("{head}Content-Length: 99999999999999999999\r\n\r\n"),
            format!("{head}Content-Length : 1\r\n\r\n"),
            format!("{head} Content-Length: 1\r\n\r\n"),
            format!("{head}X: y\r\n z\r\n\r\n"),
            format!("{head}Transfer-Encoding: xchunked\r\n\r\n"),
            format!("{head}Transfer-Encoding: chunked, identity\r\n\r\n"),
            format!("{head}Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n"),
            format!("{head}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
            format!("{head}Transfer-Encoding:\u{b}chunked\r\n\r\n"),
            format!("{head}Transfer\0-Encoding: chunked\r\n\r\n"),
            format!("{head}X: a\rb\r\n\r\n"),
            format!("{head}X: a\nContent-Length: 1\r\n\r\n"),
            format!("{head}\n"),
            format!("{head}Host: b\r\n\r\n"),
            format!("{head}: x\r\n\r\n"),
            format!("{head}X\r\n\r\n"),
            "GET / HTTP/1.1\r\n\r\n".to_owned(),
            "GET / HTTP/1.1\nHost: a\n\n".to_owned(),
            "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "GET  / HTTP/1.1\r\n".to_owned(),
            "GET /a b HTTP/1.1\r\n".to_owned(),
            "GET\t/ HTTP/1.1\r\n".to_owned(),
            "GET / HTTP/1.0\r\n".to_owned(),
            "GET / HTTP/1.11\r\n".to_owned(),
            "GET /\r\n".to_owned(),
            "GET http://b/ HTTP/1.1\r\n".to_owned(),
            "GET * HTTP/1.1\r\n".to_owned(),
            "CONNECT b:1 HTTP/1.1\r\n".to_owned(),
            "TRACE / HTTP/1.1\r\n".to_owned(),
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
            "\u{16}\u{3}\u{1}\r\n".to_owned(),
            format!("{chunked}1\n"),
            format!("{chunked}1;x=y\r\n"),
            format!("{chunked}+1\r\n"),
            format!("{chunked}0x1\r\n"),
            format!("{chunked}\r\n"),
            format!("{chunked}10000000000000000\r\n"),
            format!("{chunked}1\r\nab\r\n"),
            format!("{chunked}1\r\na\n"),
            format!("{chunked}0\r\nContent-Length: 1\r\n\r\n"),
            format!("{chunked}0\r\nX\r\n\r\n"),
            // Something behind a wish to switch; and a body with it.
            format!("{head}Upgrade: websocket\r\n\r\nGET / HTTP/1.1\r\n"),
            format!("{head}Upgrade: websocket\r\nContent-Length: 1\r\n\r\n"),
            format!("{head}Upgrade: WebSocket\r\nTransfer-Encoding: chunked\r\n\r\n"),
            long,
            many,
        ] {
            let refused = verdict(bytes.as_bytes()).expect_err(&bytes);
            let whole_head = bytes[..refused.fine].contains("\r\n\r\n");
            assert_eq!(whole_head, !refused.in_head, "no whole head passes: {bytes:?}");
        }
    }

    proptest! {
        /// Whatever comes, and however it is cut, the verdict is the same; and what passes as a head is one to the
        /// parser behind, too.
        #[test]
        fn cuts_change_nothing(
            picks in prop::collection::vec((0..PIECES.len(), 0..3usize), 1..24),
            cuts in prop::collection::vec(1..9usize, 1..40),
        ) {
            let mut bytes: Vec<u8> =
                picks.iter().flat_map(|(piece, _)| PIECES[*piece].as_bytes()).copied().collect();
            if picks[0].1 != 0 {
                bytes = [b"POST / HTTP/1.1\r\nHost: a\r\n", &bytes[..]].concat();
            }
            let whole = verdict(&bytes);
            let mut framing = Framing::new();
            let (mut at, mut cut) = (0, cuts.iter().cycle());
            let mut verdict = Ok(());
            while at < bytes.len() && verdict.is_ok() {
                let end = (at + cut.next().copied().unwrap_or(1)).min(bytes.len());
                // What comes later than the head of a switch is not read here at all.
                if framing.is_switching() {
                    verdict = Err(Refused { fine: at.saturating_sub(1), in_head: true });
                    break;
                }
                verdict = framing.read(&bytes[at..end]).map_err(|refused| Refused { fine: at + refused.fine, ..refused });
                at = end;
            }
            prop_assert_eq!(verdict, whole);

            let fine = &bytes[..whole.map_or_else(|refused| refused.fine, |()| bytes.len())];
            if let Some(end) = fine.windows(4).position(|end| end == b"\r\n\r\n") {
                let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
                let parsed = httparse::Request::new(&mut fields).parse(fine);
                prop_assert_eq!(parsed, Ok(httparse::Status::Complete(end + 4)), "{:?}", String::from_utf8_lossy(fine));
            }
        }
    }

    const PIECES: [&str; 26] = [
        "GET / HTTP/1.1\r\n",
        "Host: a\r\n",
        "\r\n",
        "\n",
        "\r",
        "X: y\r\n",
        "Content-Length: 5\r\n",
        "Content-Length: 0\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Upgrade: websocket\r\n",
        "hello",
        "5\r\n",
        "0\r\n",
        "hello\r\n",
        " ",
        "\t",
        ":",
        "\0",
        "é",
        "POST /x HTTP/1.1\r\n",
        "Transfer-Encoding: x\r\n",
        ";a=b",
        "0\r\n\r\n",
        "Connection: close\r\n",
        "1",
        "#",
    ];
}
