//! The template of our own pages: a file with `{{status}}`, `{{title}}`,
//! `{{text}}` and `{{id}}` in it, read once.

use std::path::Path;

/// The largest template, in bytes: a page is sent whole to everybody who meets
/// an error.
const TEMPLATE_MAX: usize = 256 << 10;

/// A template, cut at its fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Status,
    Title,
    Words,
    Id,
}

/// What a page says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Said<'a> {
    pub(super) status: u16,
    pub(super) title: &'a str,
    pub(super) text: &'a str,
    pub(super) id: &'a str,
}

impl Template {
    /// The template in this file, or the one that is built in.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(file: Option<&Path>) -> Result<Self, String> {
        let Some(file) = file else { return Self::parse(include_str!("error_page.html")) };
        let at = |problem: String| format!("http.error_page: {}: {problem}", file.display());
        let text = std::fs::read_to_string(file).map_err(|error| at(error.to_string()))?;
        Self::parse(&text).map_err(at)
    }

    fn parse(text: &str) -> Result<Self, String> {
        if text.len() > TEMPLATE_MAX {
            return Err(format!("is larger than {} KiB", TEMPLATE_MAX >> 10));
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("{{") {
            let (name, after) = after.split_once("}}").ok_or("has a {{ without }}")?;
            parts.push(Part::Text(before.to_owned()));
            parts.push(match name.trim() {
                "status" => Part::Status,
                "title" => Part::Title,
                "text" => Part::Words,
                "id" => Part::Id,
                other => {
                    let other = other.escape_debug();
                    return Err(format!("{{{{{other}}}}} is not known; write status, title, text or id"));
                }
            });
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        Ok(Self(parts))
    }

    /// The page.
    pub(super) fn fill(&self, said: Said<'_>) -> String {
        let mut page = String::with_capacity(1024);
        for part in &self.0 {
            match part {
                Part::Text(text) => page.push_str(text),
                Part::Status => page.push_str(&said.status.to_string()),
                Part::Title => escape(&mut page, said.title),
                Part::Words => escape(&mut page, said.text),
                Part::Id => escape(&mut page, said.id),
            }
        }
        page
    }
}

fn escape(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: Said<'_> = Said { status: 502, title: "<b>", text: "\"x\" & 'y'", id: "a&b" };

    #[test]
    fn fields_are_filled_in_and_escaped() {
        let built_in = Template::read(None).unwrap().fill(SAID);
        assert!(built_in.contains("<h1>502 &lt;b&gt;</h1>") && built_in.contains("&quot;x&quot; &amp; &#39;y&#39;"));
        assert!(built_in.contains("Request a&amp;b") && !built_in.contains("{{"));
        let own = Template::parse("{{ id }}-{{status}}").unwrap();
        assert_eq!(own.fill(SAID), "a&amp;b-502");
    }

    #[test]
    fn a_bad_template_is_named_with_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("page.html");
        for (text, word) in [("{{stats}}", "{{stats}} is not known"), ("a {{status", "without }}")] {
            std::fs::write(&file, text).unwrap();
            let problem = Template::read(Some(&file)).unwrap_err();
            assert!(problem.contains("page.html") && problem.contains(word), "{problem}");
        }
        std::fs::write(&file, "x".repeat(TEMPLATE_MAX + 1)).unwrap();
        assert!(Template::read(Some(&file)).unwrap_err().contains("larger"));
        assert!(Template::read(Some(&dir.path().join("none"))).unwrap_err().contains("http.error_page"));
    }
}
