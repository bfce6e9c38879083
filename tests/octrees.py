"""Writers of COPC files and EPT folders for tests: the smallest that follow the formats, from any cloud.

No library writes COPC from Python; what these write is read by laspy's own COPC reader as well (see the tests).
"""

import io
import json
import struct
from pathlib import Path

import laspy
import lazrs
import numpy as np

Key = tuple[int, int, int, int]


def octree(places, low, side, *, span, leaf):
    """Node -> indices of its points: the first point of each of span³ cells stays, the others go down to the children."""
    nodes: dict[Key, np.ndarray] = {}
    waiting = [((0, 0, 0, 0), np.arange(len(places)))]
    while waiting:
        key, index = waiting.pop()
        size = side / 2 ** key[0]
        inside = (places[index] - (low + np.array(key[1:]) * size)) / size
        if len(index) <= leaf:
            nodes[key] = index
            continue
        cell = np.clip((inside * span).astype(np.int64), 0, span - 1)
        _, first = np.unique(cell @ np.array([1, span, span * span]), return_index=True)
        nodes[key] = index[np.sort(first)]
        rest = np.ones(len(index), bool)
        rest[first] = False
        octant = np.clip((inside[rest] * 2).astype(np.int64), 0, 1)
        code = octant @ np.array([1, 2, 4])
        for child in np.unique(code).tolist():
            bits = np.array([child & 1, child >> 1 & 1, child >> 2 & 1])
            waiting.append(((key[0] + 1, *(2 * np.array(key[1:]) + bits).tolist()), index[rest][code == child]))
    return dict(sorted(nodes.items()))


def cube(cloud):
    """Corner and side of a cube around a cloud, on whole units."""
    low = np.floor([cloud.x.min(), cloud.y.min(), cloud.z.min()])
    high = np.ceil([cloud.x.max(), cloud.y.max(), cloud.z.max()])
    return low, float((high - low).max()) + 1.0


def write_copc(path, cloud, *, span=32, leaf=500, page_level=None, late_wkt=False, padding=0):
    """A COPC file of a cloud of point format 6, 7 or 8.

    Args:
        path: where to.
        cloud: laspy.LasData.
        span: cells along a side of a node.
        leaf: a node with at most so many points has no children.
        page_level: nodes from this level on stand in pages of their own, one for each subtree.
        late_wkt: put the CRS behind the points.
        padding: bytes of records of no meaning before the points, at most 65535.
    """
    low, side = cube(cloud)
    nodes = octree(np.column_stack([cloud.x, cloud.y, cloud.z]), low, side, span=span, leaf=leaf)
    header = laspy.LasHeader(version="1.4", point_format=cloud.header.point_format.id)
    header.scales, header.offsets = cloud.header.scales, cloud.header.offsets
    header.global_encoding.wkt = True
    header.global_encoding.gps_time_type = cloud.header.global_encoding.gps_time_type
    vlr = lazrs.LazVlr.new_for_compression(header.point_format.id, 0, use_variable_size_chunks=True)
    info = struct.pack("<3d2d2Q2d88x", *(low + side / 2), side / 2, side / span, 0, 0, 0.0, 0.0)
    header.vlrs.append(laspy.VLR(user_id="copc", record_id=1, description="COPC info", record_data=info))
    header.vlrs.append(laspy.VLR("laszip encoded", 22204, "", vlr.record_data()))
    if padding:
        header.vlrs.append(laspy.VLR(user_id="padding", record_id=1, description="", record_data=bytes(padding)))
    wkt = [v for v in cloud.header.vlrs if v.user_id == "LASF_Projection"]
    if wkt and not late_wkt:
        header.vlrs.append(wkt[0])
    header.update(cloud.points)
    header.are_points_compressed = True

    file = io.BytesIO()
    header.write_to(file)
    start = file.tell()
    compressor = lazrs.LasZipCompressor(file, vlr)
    for index in nodes.values():
        compressor.compress_many(np.ascontiguousarray(cloud.points.array[index]).view(np.uint8))
        compressor.finish_current_chunk()
    compressor.done()
    file.seek(start)
    table = lazrs.read_chunk_table(file, vlr)[: len(nodes)]  # an empty chunk ends it
    assert [count for count, _ in table] == [len(index) for index in nodes.values()]
    places, place = {}, start + 8
    for key, (count, size) in zip(nodes, table, strict=True):
        places[key] = (place, size, count)
        place += size

    file.seek(0, io.SEEK_END)
    first = file.tell()
    pages: dict[Key | None, list[Key]] = {None: []}
    for key in nodes:
        if page_level is None or key[0] < page_level:
            pages[None].append(key)
        else:
            top = (page_level, *(c >> (key[0] - page_level) for c in key[1:]))
            pages.setdefault(top, []).append(key)
    subtrees = [key for key in pages if key is not None]
    at, where = first + 60 + 32 * (len(pages[None]) + len(subtrees)), {}
    for top in subtrees:
        where[top] = at
        at += 32 * len(pages[top])
    data = b"".join(struct.pack("<4iQii", *key, *places[key]) for key in pages[None])
    data += b"".join(struct.pack("<4iQii", *top, where[top], 32 * len(pages[top]), -1) for top in subtrees)
    root_size = len(data)
    data += b"".join(struct.pack("<4iQii", *key, *places[key]) for top in subtrees for key in pages[top])
    records = [(b"copc", 1000, data)]
    if late_wkt:
        records.append((b"LASF_Projection", 2112, wkt[0].record_data_bytes()))
    for user, record, body in records:
        file.write(struct.pack("<2x16sHQ32x", user, record, len(body)) + body)
    raw = bytearray(file.getvalue())
    struct.pack_into("<QI", raw, 235, first, len(records))
    struct.pack_into("<QQ", raw, 375 + 54 + 40, first + 60, root_size)
    Path(path).write_bytes(raw)
    return Path(path)


def write_ept(folder, cloud, *, span=32, leaf=500, page_level=None, binary=False, srs=None):
    """An EPT folder of a cloud, laszip or binary; arguments as in `write_copc`."""
    low, side = cube(cloud)
    nodes = octree(np.column_stack([cloud.x, cloud.y, cloud.z]), low, side, span=span, leaf=leaf)
    folder = Path(folder)
    (folder / "ept-data").mkdir(parents=True)
    (folder / "ept-hierarchy").mkdir()
    schema = [
        {"name": axis, "type": "signed", "size": 4, "scale": float(scale), "offset": float(offset)}
        for axis, scale, offset in zip("XYZ", cloud.header.scales, cloud.header.offsets, strict=True)
    ]
    schema += [
        {"name": name, "type": "unsigned", "size": 1}
        for name in ("ReturnNumber", "NumberOfReturns", "Classification", "ClassFlags")
    ]
    for key, index in nodes.items():
        path = folder / "ept-data" / "-".join(map(str, key))
        if binary:
            record = np.zeros(len(index), [(d["name"], "<i4" if d["size"] == 4 else "u1") for d in schema])
            for name, values in zip(
                record.dtype.names,
                (cloud.X, cloud.Y, cloud.Z, cloud.return_number, cloud.number_of_returns, cloud.classification,
                 np.asarray(cloud.withheld, np.uint8) << 2 | np.asarray(cloud.overlap, np.uint8) << 3),
                strict=True,
            ):  # fmt: skip
                record[name] = np.asarray(values)[index]
            path.with_suffix(".bin").write_bytes(record.tobytes())
        else:
            part = laspy.LasData(laspy.LasHeader(version="1.4", point_format=cloud.header.point_format.id))
            part.header.scales, part.header.offsets = cloud.header.scales, cloud.header.offsets
            part.header.global_encoding.gps_time_type = cloud.header.global_encoding.gps_time_type
            part.points = laspy.ScaleAwarePointRecord(
                cloud.points.array[index], cloud.points.point_format, cloud.header.scales, cloud.header.offsets
            )
            part.write(path.with_suffix(".laz"))
    pages: dict[Key, dict[str, int]] = {(0, 0, 0, 0): {}}
    for key, index in nodes.items():
        top = (0, 0, 0, 0)
        if page_level is not None and key[0] >= page_level:
            top = (page_level, *(c >> (key[0] - page_level) for c in key[1:]))
            pages[0, 0, 0, 0]["-".join(map(str, top))] = -1
        pages.setdefault(top, {})["-".join(map(str, key))] = len(index)
    for top, page in pages.items():
        (folder / "ept-hierarchy" / ("-".join(map(str, top)) + ".json")).write_text(json.dumps(page))
    crs = cloud.header.parse_crs()
    ept = {
        "version": "1.1.0", "dataType": "binary" if binary else "laszip", "hierarchyType": "json", "span": span,
        "points": len(cloud.points), "schema": schema,
        "bounds": [*low.tolist(), *(low + side).tolist()],
        "boundsConforming": [*map(float, cloud.header.mins), *map(float, cloud.header.maxs)],
        "srs": srs if srs is not None else {"wkt": crs.to_wkt("WKT1_GDAL")} if crs is not None else {},
    }  # fmt: skip
    (folder / "ept.json").write_text(json.dumps(ept))
    return folder
