"""The full repertoire of drawn clips: what they can mean, the captions that say so, and how they are drawn.

Modules: `meaning` (what a caption says), `language` (captions and their parser), `draw` (scenes from seeds), `render`
(scenes to pixels, on any device) and `judge` (what a clip shows, found with OpenCV).
"""
