//! What a person sees on a terminal: as much of one as a bar and a report need.

/// A terminal's lines, by what a program wrote.
pub struct Screen {
    columns: usize,
    lines: Vec<String>,
    /// Where the cursor is in the last line.
    column: usize,
    /// What stood on a line when the cursor went back to its start.
    pub drawn: Vec<String>,
}

impl Screen {
    /// An empty one.
    pub fn new(columns: u16) -> Self {
        Self { columns: columns.into(), lines: vec![String::new()], column: 0, drawn: Vec::new() }
    }

    /// Shows what a program wrote. It may go back to the start of the line, and clear what is right of the cursor.
    #[track_caller]
    pub fn show(&mut self, text: &str) {
        let mut rest = text.chars().peekable();
        while let Some(c) = rest.next() {
            let line = self.lines.last_mut().unwrap();
            match c {
                '\r' if rest.next_if_eq(&'\n').is_some() => {
                    self.lines.push(String::new());
                    self.column = 0;
                }
                '\r' => {
                    self.drawn.extend(Some(line.clone()).filter(|line| !line.is_empty()));
                    self.column = 0;
                }
                '\x1b' => {
                    assert_eq!((rest.next(), rest.next()), (Some('['), Some('K')), "{text:?}");
                    *line = line.chars().take(self.column).collect();
                }
                c => {
                    assert!(!c.is_control(), "{c:?} in {text:?}");
                    let after = line.chars().skip(self.column + 1);
                    *line = line.chars().take(self.column).chain([c]).chain(after).collect();
                    self.column += 1;
                }
            }
        }
    }

    /// The lines that are left at the end: the cursor is at the start of a fresh one.
    #[track_caller]
    pub fn left(mut self) -> Vec<String> {
        let last = self.lines.pop();
        assert_eq!((last.as_deref(), self.column), (Some(""), 0), "after {:?}", self.lines);
        self.lines
    }

    /// The first line drawn that wraps, if one does: it can't be drawn over.
    pub fn too_wide(&self) -> Option<&String> {
        self.drawn.iter().find(|line| line.chars().count() >= self.columns)
    }
}
