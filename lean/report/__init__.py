"""The report on a quantised model: plain data (`schema`), a page made from it (`page`), and the files of both."""
