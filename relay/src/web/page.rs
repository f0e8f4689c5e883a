//! The two pages of ours: that nothing is here, and that a leg failed.

use adit_client::place::Place;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::{Either, Full};
use hyper::body::Incoming;

use super::target::{Failure, Leg};

/// What a browser gets: a page of ours, or what the target sends.
pub(super) type Answer = Response<Either<Incoming, Full<Bytes>>>;

const NOTHING: &str = "Nothing is here.\r\n";

/// For whoever has no business here, whatever he tried: the same bytes for all.
pub(super) fn nothing() -> Answer {
    let mut answer = text(StatusCode::NOT_FOUND, NOTHING.to_owned());
    let headers = answer.headers_mut();
    headers.insert("strict-transport-security", HeaderValue::from_static("max-age=31536000"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// The body of a request was framed in a way that is refused.
pub(super) fn malformed() -> Answer {
    let mut answer = text(StatusCode::BAD_REQUEST, "The request is malformed.\r\n".to_owned());
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// Says which leg failed, and why: as a page to who reads pages.
pub(super) fn failed(asked: Option<&HeaderValue>, agent: &str, target: &str, failure: &Failure) -> Answer {
    let (to_agent, to_target) = match failure.leg {
        Leg::Agent => (false, None),
        Leg::Target => (true, Some(false)),
    };
    let said = Said {
        title: "This page did not come through",
        why: &failure.what,
        remedy: match failure.leg {
            Leg::Agent => {
                "Check that the agent is online (adit ls), then reload this page, or ask for a new link."
            }
            Leg::Target => {
                "Check that the web server beside the agent runs and answers there, then reload this page."
            }
        },
    };
    said.answer(asked, agent, target, Some(to_agent), to_target)
}

/// The target sends the browser to another port or scheme of its machine, which this session does not lead to.
pub(super) fn elsewhere(asked: Option<&HeaderValue>, agent: &str, target: &str, place: &str) -> Answer {
    // What the target wrote is no command, unless it is a place and nothing else.
    let remedy = match place.parse::<Place>() {
        Ok(_) => format!("Ask for a link to it: adit redirect {agent} {place}"),
        Err(_) => "Ask for a link to it with adit redirect.".to_owned(),
    };
    let said = Said {
        title: "This page is somewhere else",
        why: &format!("{target} sends you to {place}, where this link does not lead."),
        remedy: &remedy,
    };
    said.answer(asked, agent, target, Some(true), Some(true))
}

struct Said<'a> {
    title: &'a str,
    why: &'a str,
    remedy: &'a str,
}

impl Said<'_> {
    fn answer(
        &self,
        asked: Option<&HeaderValue>,
        agent: &str,
        target: &str,
        to_agent: Option<bool>,
        to_target: Option<bool>,
    ) -> Answer {
        let Self { title, why, remedy } = self;
        let reads_pages =
            asked.and_then(|accept| accept.to_str().ok()).is_some_and(|accept| accept.contains("text/html"));
        if !reads_pages {
            return text(StatusCode::BAD_GATEWAY, format!("{why}\r\n{remedy}\r\n"));
        }
        let leg = |name: String, works: Option<bool>| {
            let (class, word) = match works {
                Some(true) => ("fine", "works"),
                Some(false) => ("broken", "failed"),
                None => ("", "not tried"),
            };
            format!("<li class=\"{class}\">{}: <b>{word}</b></li>", escape(&name))
        };
        let legs = [
            leg("your browser to the server".to_owned(), Some(true)),
            leg(format!("the server to the agent {agent}"), to_agent),
            leg(format!("the agent to {target}"), to_target),
        ]
        .concat();
        let page = format!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
             <meta name=\"viewport\" content=\"width=device-width\"><style>\
             body{{font:16px/1.5 system-ui,sans-serif;max-width:40em;margin:4em auto;padding:0 1em}}\
             li.broken{{color:#b00020}}li.fine{{color:#1b5e20}}@media(prefers-color-scheme:dark){{\
             body{{background:#111;color:#eee}}li.broken{{color:#ff8a80}}li.fine{{color:#a5d6a7}}}}</style>\
             <h1>{title}</h1><ol>{legs}</ol><p>{}</p><p>{}</p></html>\n",
            escape(why),
            escape(remedy),
        );
        let mut answer = plain(StatusCode::BAD_GATEWAY, "text/html; charset=utf-8", page);
        let policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'";
        answer.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
        answer
    }
}

fn text(status: StatusCode, body: String) -> Answer {
    plain(status, "text/plain; charset=utf-8", body)
}

fn plain(status: StatusCode, kind: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Either::Right(Full::new(Bytes::from(body))));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;");
    text.chars().filter(|c| !c.is_control()).take(2000).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    async fn body(answer: Answer) -> String {
        let bytes = answer.into_body().collect().await.expect("whole").to_bytes();
        String::from_utf8(bytes.to_vec()).expect("text")
    }

    #[tokio::test]
    async fn the_page_names_the_leg_and_takes_no_markup() {
        let failure = Failure {
            leg: Leg::Target,
            what: "<script>a:80: refused</script>".to_owned(),
            unreachable: true,
        };
        let plain = body(failed(None, "pc", "a:80", &failure)).await;
        assert!(plain.starts_with("<script>a:80: refused</script>\r\n"), "{plain}");
        let asked = Some(HeaderValue::from_static("text/html,*/*"));
        let page = body(failed(asked.as_ref(), "<b>pc", "a:80", &failure)).await;
        assert!(page.contains("&lt;script&gt;a:80: refused") && !page.contains("<script>"), "{page}");
        assert!(page.contains("the server to the agent &lt;b&gt;pc: <b>works"), "{page}");
        assert!(page.contains("the agent to a:80: <b>failed"), "{page}");
        let agent = Failure { leg: Leg::Agent, what: "away".to_owned(), unreachable: true };
        let page = body(failed(asked.as_ref(), "pc", "a:80", &agent)).await;
        assert!(page.contains("agent pc: <b>failed") && page.contains("a:80: <b>not tried"), "{page}");
    }
}
