"""HTTP/1.1 for the gateway's own path: uvloop protocols over httptools, which binds Node's parser llhttp.

Parsing is llhttp's, in its strict mode; bounds, time limits, back-pressure and connection reuse stand here.
"""
