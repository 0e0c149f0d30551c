"""Texts that want to be more than text, once they are shown. What runs sets window.owned."""

SET = "window.owned=1"
HOSTILE = [
    f"<script>{SET}</script>",
    f"<img src=x onerror={SET}>",
    f"'\"><svg/onload={SET}>",
    f'<a href="javascript:{SET}">x</a>',
    f"<iframe srcdoc='<script>parent.{SET}</script>'></iframe>",
    f"</p></td></table></main></body><script>{SET}</script>",
    f"</style></title></textarea></script><script>{SET}</script>",
    f"<!-- --><script>{SET}</script><!--",
    f"<![CDATA[<script>{SET}</script>]]>",
    f"{{{{ 7 * 191 }}}}{{% raw %}}<meta http-equiv=refresh content='0;url=javascript:{SET}'>",
    f"\u2028<script>{SET}</script>\u2029\x85\x0b\x0c\r<b>",
    "\u202egnp.exe \u2066\u2067 \u061c\ufeff\u00ad",
    "\x1b[2J\x1b]8;;http://evil.example\x07link\x1b]8;;\x07\x9b31m\x00\x08\x7f",
    "![x](http://evil.example/x.png) [x](javascript:alert(1)) <http://evil.example>",
    "$\\frac{$ \\href{javascript:alert(1)}{x}",
    "<style>*{display:none}</style><base href=http://evil.example/><link rel=stylesheet href=http://evil.example/>",
    "&lt;script&gt;&#x3c;script&#x3e;" + "\ud83d",
]
ALL = "\n".join(HOSTILE)
